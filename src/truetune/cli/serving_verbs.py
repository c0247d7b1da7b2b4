"""The verbs that bring a trained model to its users: export, diagnose, serve, push."""

from __future__ import annotations

import json
from contextlib import closing
from typing import Annotated

import typer

from truetune.cli.arguments import Base, Device, Json, Source
from truetune.cli.verb import open_screen
from truetune.findings import counted

_GGUF = "GGUF and Ollama"
_FEWER = "Quantisation"


def export_run(
    run: Annotated[
        str, typer.Argument(metavar="RUN|MODEL", help="A run, or a model or adapter folder.")
    ],
    output: Annotated[str, typer.Option("-o", "--output", help="Folder to write.")],
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="NAME",
            help="Format: merged, gguf, ollama, mlx, vllm or sglang, as described above. "
            "(default: merged)",
        ),
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="The same as --to merged.")] = False,
    base: Base = None,
    onto: Annotated[
        str,
        typer.Option(
            help="Weights to merge into. original: unquantised. dequantised: rounded as in "
            "training. (default: auto, those that the adapter was trained on)",
            show_default=False,
        ),
    ] = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            help="bfloat16, float16 or float32. (default: auto, the base's)", show_default=False
        ),
    ] = "auto",
    quant: Annotated[
        str | None,
        typer.Option(
            help="GGUF: f32, f16, bf16, q8_0, q6_k, q5_k_m, q5_k_s, q5_1, q5_0, q4_k_m, q4_k_s, "
            "q4_1, q4_0 (default: f16). MLX: f32, f16, bf16, 8bit, 6bit, 5bit, 4bit (default: "
            "bf16). merged, vllm, sglang: nf4, int8, torchao-int8, gptq-w4a16, gptq-w8a8 (default: "
            "none).",
            rich_help_panel=_FEWER,
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Calibration rows for GPTQ. (default: the training rows of the run)",
            rich_help_panel=_FEWER,
            show_default=False,
        ),
    ] = None,
    go_template: Annotated[
        bool,
        typer.Option(
            "--go-template",
            help="ollama: also write the template as a Go template, for Ollama before 0.30.",
            rich_help_panel=_GGUF,
        ),
    ] = False,
    adapter: Annotated[
        bool,
        typer.Option(
            "--adapter",
            help="gguf: write only the adapter, for use with a GGUF file of its base.",
            rich_help_panel=_GGUF,
        ),
    ] = False,
    device: Device = "cpu",
    no_verify: Annotated[
        bool,
        typer.Option(
            "--no-verify",
            help="Do not compare the merged model with the adapter in a fresh process.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a model in a form that servers load.

    merged: one folder that can be loaded without peft. The adapter is added in float32 to
    the original or the dequantised weights (--onto), which are then cast to the base's own dtype. A
    fresh process then compares the result with the adapter on the run's held-out prompts. A
    complete model is copied.

    gguf: one file for llama.cpp and programs built on it, from an adapter or a complete model.
    llama.cpp then serves the file, and its prompts, ids, stop tokens and predictions are compared
    with the model's. This needs the extra `gguf`.

    ollama: the GGUF file with a Modelfile. Ollama renders the file's own template; the Modelfile
    prevents it from choosing another one.

    mlx: a folder for MLX, written by mlx_lm and compared with the model. This needs the extra
    `mlx`.

    vllm, sglang: the adapter if the server can load it on its base, otherwise the merged model, and
    the command that serves it. The model is merged for DoRA, new tokens, layers trained in full,
    quantised bases, and stop tokens that the base does not have.

    With --quant, merged, vllm and sglang write a folder with quantised weights, which transformers
    and vLLM load: nf4 and int8 by bitsandbytes, torchao-int8 by torchao, gptq-w4a16 and gptq-w8a8
    by llm-compressor. Each of these libraries is an extra. The folder is reloaded and compared with
    the model, as by `truetune diagnose RUN --quantised DIR`.

    If a comparison fails, nothing is written to the output folder.

    \b
    truetune export runs/first --to merged -o merged
    truetune export runs/first --to merged --quant nf4 -o first-nf4
    truetune export runs/first --to gguf --quant q8_0 -o first-gguf
    truetune export runs/first --to ollama --quant q4_k_m -o first-ollama
    """
    from truetune.cli.export_screen import show_export
    from truetune.run.export_kind import export_as

    with closing(open_screen()) as screen:
        made = export_as(
            to,
            source=run,
            output=output,
            merge=merge,
            quant=quant,
            adapter=adapter,
            go_template=go_template,
            base=base,
            onto=onto,
            dtype=dtype,
            device=device,
            verify=not no_verify,
            data=data,
            listener=None if as_json else screen,
        )
    show_export(
        screen,
        made,
        run,
        output,
        adapter=adapter,
        ollama=to == "ollama",
        go_template=go_template,
        as_json=as_json,
    )


def diagnose_model(
    source: Source,
    merged: Annotated[str | None, typer.Option(help="The folder of the merged model.")] = None,
    quantised: Annotated[
        str | None,
        typer.Option("--quantised", "--quantized", help="The folder of a quantised model."),
    ] = None,
    gguf: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="A GGUF file made from the model; needs llama.cpp."),
    ] = None,
    url: Annotated[
        str | None, typer.Option(metavar="URL", help="Address of a server that serves the model.")
    ] = None,
    stages: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Stages to examine: base,adapter,model,merged,quantised,gguf,url. (default: all)",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA", help="Rows on which to compare the stages. (default: rows of the run)"
        ),
    ] = None,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Run the same rows through every stage between training and serving, and name the first stage
    that changes the model's behaviour, with its likely cause.

    The trained model is compared with the record of its run. Merged folders, GGUF files (through
    llama.cpp) and running servers are compared with the trained model: prompts as text and as ids,
    predictions, greedy replies, and whether they end. The exit code is 1 if a stage differs.

    \b
    truetune diagnose runs/first
    truetune diagnose runs/first --merged merged --gguf first-gguf/model-q8_0.gguf
    truetune diagnose runs/first --url http://127.0.0.1:8080
    truetune diagnose model-q4_0.gguf
    """
    from truetune.cli.diagnose_screen import show_diagnosis
    from truetune.diagnosis.diagnose import diagnose

    with closing(open_screen()) as screen:
        found = diagnose(
            source,
            stages=[name.strip() for name in stages.split(",")] if stages else (),
            base=base,
            merged=merged,
            quantised=quantised,
            gguf=gguf,
            url=url,
            data=data,
            on_stage=None if as_json else screen.stage,
        )
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=2))
    else:
        show_diagnosis(screen, found)
    if found.first is not None:
        raise typer.Exit(1)


def serve_model(
    source: Source,
    port: Annotated[
        int, typer.Option(help="Port to listen on; 0 picks a free one.", min=0, max=65535)
    ] = 8420,
    fast: Annotated[
        bool,
        typer.Option(
            "--fast", help="For GGUF files: llama.cpp's own settings, faster but less exact."
        ),
    ] = False,
    device: Device = "auto",
) -> None:
    """Serve a model to programs on this machine through an OpenAI-compatible API, until Ctrl-C.

    Runs, models and adapters are served by transformers, GGUF files by llama.cpp. Prompts are
    rendered as in training. Only this machine can reach the server, at http://127.0.0.1:PORT/v1; it
    needs no key and answers one request at a time.

    \b
    truetune serve runs/first
    truetune serve first-gguf/model-q8_0.gguf --port 8080
    """
    from truetune.cli.serve_screen import serve

    serve(open_screen(), source, port, fast=fast, device=device)


def push_model(
    source: Annotated[
        str, typer.Argument(metavar="RUN|MODEL", help="A run, or a model or adapter folder.")
    ],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the Hub.")],
    public: Annotated[
        bool, typer.Option("--public", help="Make the repository public. (default: private)")
    ] = False,
    unverified: Annotated[
        bool, typer.Option("--unverified", help="Push without verifying first.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete other files of the repository.")
    ] = False,
) -> None:
    """Push a run's model, or a merged model, to the Hub in one commit, with its model card.

    Only files that were verified and have not changed since are pushed. The token comes from `hf
    auth login` or HF_TOKEN.

    \b
    truetune push runs/first me/first
    truetune push merged me/first-merged --public
    """
    from truetune.run.push import push

    with closing(open_screen()) as screen:
        pushed = push(
            source,
            repo,
            public=public,
            unverified=unverified,
            overwrite=overwrite,
            listener=screen,
        )
    who = "private" if pushed.private else "public"
    screen.line(f"pushed {counted(len(pushed.files), 'file')}: {pushed.url} ({who})")
