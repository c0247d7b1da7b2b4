"""Every code of check, audit and rehearsal has rows or models that bring it about, and near misses
that must not; docs/findings.md says of each what it means, its cause and what to do."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from bench.sabotage.cases import CASES as SABOTAGE
from scripts.findings_page import finding_codes, findings_page, sites

from test_behaviour import SIGNS
from test_check import CASES as RUN_CASES
from test_check_checkpoint import ADAPTERS, MODELS
from test_check_data import CASES as DATA_CASES
from test_check_labels import CASES as LABEL_CASES
from test_check_quality import CASES as QUALITY_CASES

ROOMS = ("checks/", "auditing/", "behaviour/", "run/checkup.py", "run/smoke_test.py")
# (what brings it about, what nearly does), where a table would not do: tests by file and name.
LABELS, AUDIT = "test_check_labels.py", "test_audit_findings.py"
SERVED = "test_check_served.py"
REHEARSAL, SOUND = "test_check_rehearse.py", "test_a_sound_run_rehearses_in_silence"
STEPS, HEALTH = "test_behaviour.py", "test_health_callback.py"
RENDERER, SOFT = "test_one_renderer.py", "test_soft_prompts.py"
ELSEWHERE: dict[str, tuple[str, str, str]] = {
    "non-finite": (
        *("test_engine_trainer.py", "test_a_non_finite_loss_stops_before_the_optimizer"),
        "test_the_non_finite_probe_takes_finite_numbers",
    ),
    "no-gradient": (
        STEPS,
        *["test_a_gradient_of_zero_stops_and_a_row_without_targets_does_not"] * 2,
    ),
    "loss-diverged": (STEPS, *["test_divergence_is_a_window_above_its_start_or_its_best"] * 2),
    "loss-spike": (STEPS, *["test_a_spike_names_the_rows_that_stood_in_two"] * 2),
    "health-sharded": (HEALTH, *["test_sharded_weights_are_told"] * 2),
    "probe-failed": (HEALTH, *["test_a_probe_that_fails_is_told_and_training_goes_on"] * 2),
    "no-prompts": (HEALTH, *["test_a_run_without_prompts_is_told"] * 2),
    "history-not-served": (
        *(LABELS, "test_history_that_no_server_sends"),
        "test_a_template_that_keeps_reasoning_is_none_of_that",
    ),
    "reasoning-lost": (
        *(LABELS, "test_history_that_no_server_sends"),
        "test_a_template_that_keeps_reasoning_is_none_of_that",
    ),
    "padding-supervised": (
        *(LABELS, "test_labels_on_padding_are_seen_before_it_is_taken_off"),
        "test_padding_without_a_mask_keeps_one_token",
    ),
    "bos-missing": (
        *(LABELS, "test_a_begin_token_that_served_prompts_have"),
        "test_a_begin_token_that_served_prompts_have",
    ),
    "markers-lost": (
        *(SERVED, "test_rows_that_lost_their_control_tokens"),
        "test_texts_that_speak_of_users_and_assistants_lost_no_markers",
    ),
    "plain-text-rows": (
        *(SERVED, "test_plain_text_among_conversations_is_a_note"),
        "test_another_form_among_conversations_is_no_plain_text",
    ),
    "question-missing": (
        *(SERVED, "test_answers_to_no_question"),
        "test_many_answers_to_one_question_and_greetings_are_none_of_that",
    ),
    "memory-short": (
        *(REHEARSAL, "test_only_what_surely_does_not_fit_is_told"),
        "test_only_what_surely_does_not_fit_is_told",
    ),
    "accumulation-not-measured": (
        *(AUDIT, "test_accumulation_that_cannot_be_asked_is_a_note"),
        "test_a_loss_of_ones_own_is_asked_and_not_read",
    ),
    "positions-disordered": (
        *(AUDIT, "test_positions_disordered"),
        "test_positions_disordered",
    ),
    "mask-ignored": (AUDIT, "test_mask_ignored", "test_mask_ignored"),
    "attention-hole": (AUDIT, "test_attention_hole", "test_attention_hole"),
    "eval-prompt-in-train": (AUDIT, "test_eval_prompt_in_train", "test_eval_prompt_in_train"),
    "packing-needs-no-cache": (
        *(AUDIT, "test_packing_needs_no_cache"),
        "test_packing_needs_no_cache",
    ),
    "batch-fails": (
        *("test_audit.py", "test_a_collator_that_fails_is_a_finding_and_its_rows_are_judged_alone"),
        "test_a_clean_report_hands_itself_on_and_control_characters_are_shown",
    ),
    "template-unusable": (
        *(RENDERER, "test_an_audit_with_a_looping_template_ends_and_says_so"),
        "test_a_template_that_comes_to_an_end_is_usable",
    ),
    "soft-prompt": (
        *(SOFT, "test_a_soft_prompt_is_told_and_raises_nothing"),
        "test_packed_rows_see_each_other_behind_a_soft_prompt",
    ),
    "soft-prompt-recomputed": (
        *(SOFT, "test_a_prefix_is_lost_where_activations_are_recomputed"),
        "test_a_prefix_is_lost_where_activations_are_recomputed",
    ),
    "soft-prompt-unfit": (
        *(SOFT, "test_a_soft_prompt_on_another_base_is_an_error"),
        "test_a_saved_soft_prompt_is_a_note",
    ),
    "virtual-tokens-overflow": (
        *(SOFT, "test_rows_and_virtual_tokens_must_fit_the_context_together"),
        "test_rows_and_virtual_tokens_must_fit_the_context_together",
    ),
    "start-differs": (
        *(REHEARSAL, "test_weights_that_tell_another_start_than_the_template"),
        "test_weights_that_tell_another_start_than_the_template",
    ),
    "rehearsal-not-finite": (REHEARSAL, "test_weights_that_hold_nan", SOUND),
    "step-overshoots": (REHEARSAL, "test_a_rate_that_overshoots", SOUND),
    "weights-unmoved": (REHEARSAL, "test_what_a_rehearsal_sees", SOUND),
    "step-not-equal": (
        *(REHEARSAL, "test_what_a_rehearsal_sees"),
        "test_dropout_of_any_kind_is_no_difference_between_two_ways",
    ),
    "frozen-moved": (REHEARSAL, "test_what_a_rehearsal_sees", SOUND),
    "reload-differs": (REHEARSAL, "test_what_a_rehearsal_sees", SOUND),
}


def test_every_code_has_its_fixture_and_its_near_miss() -> None:
    found = {
        code
        for code, modules in finding_codes().items()
        if any(module.startswith(ROOMS) for module in modules)
    }
    tables = {**RUN_CASES, **LABEL_CASES, **DATA_CASES, **QUALITY_CASES}
    assert all(bad and good for bad, good in tables.values())
    # A case of the suite has a twin; a sound model and a sound adapter raise nothing.
    named = {code for case in SABOTAGE for code in case.codes}
    shown = {*tables, *SIGNS, *MODELS, *ADAPTERS, *named, *ELSEWHERE}
    assert found - shown == set()
    assert set(ELSEWHERE) <= found


@pytest.mark.parametrize("code", ELSEWHERE)
def test_what_is_named_elsewhere_is_there(code: str) -> None:
    file, bad, good = ELSEWHERE[code]
    text = (Path(__file__).parent / file).read_text(encoding="utf-8")
    tests = {n.name for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)}
    assert {bad, good} <= tests
    assert f'"{code}"' in text


def test_every_finding_says_what_and_an_error_why_and_what_to_do() -> None:
    told = [site for site in sites() if site.kind == "finding"]
    assert [site.code for site in told if not site.what] == []
    judged = [site for site in told if site.module.startswith(ROOMS) and site.level != "note"]
    assert [site.code for site in judged if not site.fix] == []
    assert [site.code for site in judged if not site.why and site.code != "prompt-differs"] == []


def test_the_page_has_a_section_a_code_with_its_sentences() -> None:
    page = findings_page()
    section = page.partition("## `labels-misaligned`")[2].partition("\n## ")[0]
    assert "finding (error); `checks/labels/targets.py`" in section
    assert "* labels are \u2039name\u203a instead of the token at their position / " in section
    assert "    * why: the labels were shifted, and the model shifts them again" in section
    assert "    * fix: use labels = input_ids, with -100 where nothing is to be learned" in section
    # What a helper of the module says is written out.
    section = page.partition("## `stop-not-supervised`")[2].partition("\n## ")[0]
    assert "the collator masks every pad token" in section
    assert "the mask stops before the end token" in section
    # Codes of a table, codes by a condition, and the code of a class.
    section = page.partition("## `target-dropped`")[2].partition("\n## ")[0]
    assert "* the template strips the outer whitespace of \u2039label\u203a of message" in section
    assert "* the archive cannot be unpacked" in page.partition("## `broken-zstd`")[2]
    assert "* the recipe is not valid YAML" in page.partition("## `input`")[2]
    assert page.count("\n## `") == len({site.code for site in sites()})
