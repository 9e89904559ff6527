"""`check` tells right from wrong, and says what it is."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer import Typer
from typer.testing import CliRunner

from qwen_rerank.check import CheckOptions, check
from qwen_rerank.check.agreement import FittedPrompt
from qwen_rerank.check.reference import Reference
from qwen_rerank.check.scales import SCALES
from qwen_rerank.check.variants import RECIPE
from qwen_rerank.cli.check import register
from qwen_rerank.testing import OverlapScorer
from tests.check import faulty
from tests.check.faulty import FaultyServer, Model, sigmoid
from tests.checkpoints import small_checkpoint
from tests.scorers.http.stub import serving
from tests.serve.conftest import live_server

SIZES = {"hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "intermediate": 96}
app = Typer()
register(app)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return small_checkpoint(tmp_path_factory.mktemp("model") / "untied", kind="untied", seed=1, **SIZES)


@pytest.fixture(scope="module")
def model(checkpoint):
    return Model(checkpoint)


@pytest.fixture(scope="module")
def opened(checkpoint):
    return Reference(str(checkpoint))


@pytest.fixture
def run(model, opened):
    def run(reference=True, tokenizer=None, **faults):
        options = CheckOptions(reference=opened if reference else None, tokenizer=tokenizer, long_tokens=1024)
        with serving(FaultyServer(model, **faults).handle) as server:
            return check(server.url, options)

    return run


def of(report, name):
    [finding] = [finding for finding in report.findings if finding.check == name]
    return finding


def test_a_right_server_is_right(run):
    report = run()

    assert (report.verdict, report.cause, report.exit_code) == ("right", "recipe", 0)
    assert of(report, "token count").status == "ok"
    assert of(report, "instruction").status == "ok"
    assert of(report, "exact prompts").status == "ok"


WRONG = {
    "no-template": {"render": faulty.no_template},
    "newline-short": {"render": faulty.newline_short},
    "sglang-template": {"render": faulty.sglang_template},
    "empty-prompt": {"render": faulty.hub_template},
    "sigmoid-twice": {"activate": lambda x: sigmoid(sigmoid(x))},
    "labels-swapped": {"activate": lambda x: sigmoid(-x)},
    "embedding-head": {"from_embedding": True},
    "instruction-ignored": {"render": faulty.ignores_instruction},
    "suffix-cut": {"render": faulty.suffix_cut},
}


@pytest.mark.parametrize("cause", WRONG)
def test_every_known_fault_is_named(run, cause):
    report = run(**WRONG[cause])

    assert (report.verdict, report.cause, report.exit_code) == ("wrong", cause, 1)


@pytest.mark.parametrize(
    ("cause", "render"),
    [("two-newlines", faulty.two_newlines), ("repository-instruction", faulty.repository_instruction)],
)
def test_the_authors_own_variants_are_named_but_not_wrong(run, cause, render):
    report = run(render=render)

    assert (report.verdict, report.cause) == ("right", cause)
    assert of(report, "agreement").status == "warning"


def test_logits_are_right_scores_with_a_warning(run):
    report = run(activate=lambda x: x)

    assert (report.verdict, report.cause) == ("right", "recipe")
    assert of(report, "range").status == "warning"


def test_rounding_is_no_fault(run):
    """bfloat16 and other kernels move log-odds a little."""
    assert run(noise=0.04).cause == "recipe"


def test_another_model_is_wrong_and_no_prompt_is_blamed(model, tmp_path):
    other = small_checkpoint(tmp_path / "other", kind="untied", seed=7, **SIZES)
    with serving(FaultyServer(model).handle) as server:
        report = check(server.url, CheckOptions(reference=str(other)))

    assert (report.verdict, report.cause) == ("wrong", "")
    assert "cannot tell why" in of(report, "agreement").why


def test_without_a_reference_nothing_is_claimed(run):
    report = run(reference=False)

    assert (report.verdict, report.exit_code) in [("cannot tell", 2), ("wrong", 1)]
    assert of(report, "agreement").status == "skipped"


@pytest.mark.parametrize(
    ("check_name", "faults"),
    [
        ("constant scores", {"render": faulty.hub_template}),
        ("instruction", {"render": faulty.ignores_instruction}),
    ],
)
def test_gross_faults_show_without_a_reference(run, check_name, faults):
    assert of(run(reference=False, **faults), check_name).status == "wrong"


def test_a_squeezed_range_shows_without_a_reference(run):
    assert of(run(reference=False, activate=lambda x: sigmoid(sigmoid(x))), "range").status == "warning"


def test_the_token_count_alone_gives_a_missing_template_away(run, checkpoint):
    report = run(reference=False, tokenizer=str(checkpoint), render=faulty.no_template)

    assert of(report, "token count").status == "wrong"
    assert "no template" in of(report, "token count").why


def test_control_strings_in_documents_are_found(run):
    """A server that renders text and parses it lets a document end its turn."""
    finding = of(run(), "control strings")

    assert finding.status == "warning"
    assert "read as a control token" in finding.saw


@pytest.mark.parametrize(
    ("cuts", "status", "words"),
    [("refuses", "warning", "fails the request"), ("end", "wrong", "the end of the prompt was cut off")],
)
def test_long_documents(run, cuts, status, words):
    finding = of(run(length=512, cuts=cuts), "long document")

    assert finding.status == status
    assert words in finding.saw


def test_a_score_that_cannot_be_of_the_fitted_scale_fits_no_way_of_cutting(opened):
    """A server of probabilities that answers 1.5 for a long document is not compared with what cutting would give."""
    fitted = FittedPrompt(opened, RECIPE, "true", SCALES[0])
    [prompt] = opened.encoder.encode("q", ["d"])
    ways = {"document": [prompt.ids], "end": [prompt.ids[:-1]]}

    assert fitted.nearest(np.array([1.5]), ways) is None
    assert (
        fitted.nearest(np.array([sigmoid(opened.log_odds([prompt.ids])[0])]), ways)[0].hypothesis.prompt == "document"
    )


def test_golden_pairs_are_compared_when_the_name_is_official(run):
    """The small checkpoint is not the official one, whatever it calls itself."""
    finding = of(run(name="Qwen/Qwen3-Reranker-0.6B"), "golden pairs")

    assert finding.status == "wrong"
    assert "published [-3.11, 7.12, -0.38, 3.54, 7.62, -11.38]" in finding.saw


def test_a_server_of_a_model_that_takes_no_instruction_is_checked_without_one():
    scorer = OverlapScorer()
    scorer.takes_instruction = False
    with live_server(lambda: scorer) as server:
        report = check(server.url, CheckOptions(long_tokens=1024))

    found = of(report, "instruction")
    assert found.status == "warning"
    assert "overlap takes none; leave it out" in found.saw
    assert found.cure
    assert of(report, "long document").saw  # what comes after it was asked


def test_a_local_model_is_compared_with_the_slow_path(checkpoint):
    report = check(str(checkpoint))

    assert (report.verdict, report.cause) == ("right", "recipe")
    assert of(report, "control strings").status == "ok"


def test_the_command_prints_cause_and_cure(model, checkpoint):
    with serving(FaultyServer(model, render=faulty.newline_short).handle) as server:
        result = CliRunner().invoke(app, ["check", server.url, "--reference", str(checkpoint)], env={"COLUMNS": "200"})

    assert result.exit_code == 1
    assert "one newline short" in result.output
    assert "qwen-rerank template vllm > qwen3.jinja" in result.output
    assert "The scores cannot be trusted: see agreement" in result.output


def test_the_command_prints_json(model, checkpoint):
    with serving(FaultyServer(model).handle) as server:
        result = CliRunner().invoke(app, ["check", server.url, "--reference", str(checkpoint), "--json"])

    report = json.loads(result.stdout)
    assert result.exit_code == 0
    assert (report["verdict"], report["cause"]) == ("right", "recipe")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "bfloat16", "--dialect", "tei"], "--dialect only goes without --quantize and --dtype"),
        (["--queries", "5"], "--queries only goes with --quantize or --dtype"),
        (["--dtype", "bfloat16", "--queries", "1"], "--queries must be at least 2"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(arguments, message):
    result = CliRunner().invoke(app, ["check", "pocket", *arguments])

    assert message in str(result.exception)
