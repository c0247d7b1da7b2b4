"""The child process in which llama.cpp serves one GGUF file.

input   settings (one line of JSON on standard input)
does    starts xllamacpp's server on a free port of this machine
output  its address, or an error (one line of JSON on standard output); ends with its input
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def parameters(settings: dict[str, Any]) -> Any:
    """xllamacpp's parameters.

    Args:
        settings: see `llama_cpp.serving`.
    """
    import xllamacpp

    made = xllamacpp.CommonParams()
    made.model.path = settings["path"]
    made.hostnames = ["127.0.0.1"]
    made.port = settings["port"]
    made.n_ctx = settings["context"]
    # What is promised is promised of requests one after the other.
    made.n_parallel = 1
    made.n_gpu_layers = settings["gpu_layers"]
    made.cpuparams.n_threads = settings["threads"]
    made.cpuparams_batch.n_threads = settings["threads"]
    made.warmup = False
    # It would shrink the context to what it thinks is free.
    made.fit_params = False
    made.endpoint_props = False
    made.ui = False
    made.n_threads_http = 4
    # Pages of browsers have no business here.
    made.cors_origins = ""
    made.cache_ram_mib = 0
    if settings["key"]:
        made.api_keys = [settings["key"]]
    if settings["exact"]:
        # Half-precision keys and fused attention cost 2e-3 in log-probability.
        made.cache_type_k = made.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        made.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        # A window's cache forgets what a later request with the same beginning needs.
        made.swa_full = True
    if settings["template_kwargs"]:
        # As JSON texts, which is how --chat-template-kwargs stores them.
        made.default_template_kwargs = {
            name: json.dumps(value) for name, value in settings["template_kwargs"].items()
        }
    if settings["template"]:
        made.chat_template = settings["template"]
    if settings["adapter"]:
        made.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(settings["adapter"], 1.0)]
    if settings["name"]:
        made.model_alias = {settings["name"]}
    made.verbosity = 1 if not settings["verbose"] else 3
    return made


def main() -> None:
    reply = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    # llama.cpp writes to standard output as well.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    settings = json.loads(sys.stdin.readline())
    import xllamacpp

    try:
        server = xllamacpp.Server(parameters(settings))
        said = {"address": server.listening_address}
    except Exception as error:
        server, said = None, {"error": str(error)}
    print(json.dumps(said), file=reply, flush=True)
    if server is not None:
        sys.stdin.read()
    # Its threads are not waited for.
    os._exit(0)


if __name__ == "__main__":
    main()
