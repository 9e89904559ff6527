"""Plans by hand, and the simulation of queues against what theory knows exactly."""

from __future__ import annotations

import gzip
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from qwen_rerank.capacity import (
    Failures,
    ServerTimes,
    Speed,
    make_plan,
    poisson_arrivals,
    read_speeds,
    server_times,
    shipped_speeds,
    simulate,
)
from qwen_rerank.cli import app
from qwen_rerank.errors import InvalidInputError

ROOT = Path(__file__).resolve().parents[1]
SPEED = Speed(name="x", what="a model", documents_per_s=1000.0, tokens=128, source="here")
ALONE = ServerTimes(pass_s=[1.0], most_in_a_pass=1, max_wait_s=1e9)


# --- plans -------------------------------------------------------------------------------------------------------------


def test_the_arithmetic_is_what_a_pencil_gives():
    """20 queries of 100 documents are 2,000 a second; 256 tokens halve the speed, 80 % of 500 are 400: 5 machines and 1."""
    plan = make_plan(SPEED, requests_per_s=20, documents=100, tokens=256, price=3.0, busy=0.8, spare=1)

    assert (plan.documents_per_s, plan.machine_documents_per_s, plan.machines) == (2000, 500, 6)
    assert plan.busy == pytest.approx(2 / 3)
    assert plan.busy_without_spare == pytest.approx(0.8)
    assert plan.cost_per_hour == 18
    assert plan.cost_per_million == pytest.approx(18 / (20 * 3600) * 1e6)
    assert dict(plan.lines)["machines"] == "2,000 / 400 = 5.00, so 5; and 1 spare: 6"
    assert dict(plan.lines)["cost of a million reranks"] == "18.00 / (20 x 3,600) x 1,000,000 = 250.00"


def test_a_load_however_small_needs_a_machine():
    plan = make_plan(SPEED, requests_per_s=1e-7, documents=1, tokens=128)

    assert plan.machines == 1
    assert plan.busy == pytest.approx(1e-10)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"requests_per_s": 0}, "requests_per_s must be a number above 0"),
        ({"requests_per_s": math.nan}, "requests_per_s"),
        ({"documents": 0}, "documents"),
        ({"tokens": 1.5}, "tokens"),
        ({"price": -1}, "price must be"),
        ({"busy": 1.1}, "busy must be a share"),
        ({"spare": -1}, "spare must be"),
        ({"requests_per_s": 1e308, "documents": 10**9}, "more than any number of machines"),
    ],
)
def test_a_wrong_number_is_named(wrong, message):
    with pytest.raises(InvalidInputError, match=message):
        make_plan(SPEED, **{"requests_per_s": 1, "documents": 1, "tokens": 1, **wrong})


@pytest.mark.parametrize("model", ["simulated", "plan"])
def test_the_page_says_of_the_real_server_what_was_measured(model):
    """The page: at all three loads median and throughput agreed within 20 %, the 99th percentile within the runs."""
    loads = json.loads((ROOT / "eval/serving/results/capacity.json").read_text())["figures"]["loads"]

    assert [one["load"] for one in loads] == [0.3, 0.6, 0.8]
    for one in loads:
        for figure in ("p50", "throughput_per_s"):
            assert one[model][figure] == pytest.approx(one["measured"][figure], rel=0.2)
        lowest, highest = one["p99_of_the_runs_ms"]
        assert lowest <= one[model]["p99"] <= highest


def test_the_shipped_speeds_are_those_that_were_measured():
    """Users have no eval folder; what ships is a copy of its figures."""
    shipped = {speed.name: speed.documents_per_s for speed in shipped_speeds()}
    results = ROOT / "eval/speed/results"
    gpu, cpu = (json.loads((results / name).read_text())["workloads"] for name in ("gpu-0.6B.json", "cpu-2-cores.json"))
    mini = json.loads((ROOT / "eval/pocket/mini/results/speed.json").read_text())

    assert shipped == pytest.approx(
        {
            "h100": gpu["throughput 250x100x128"]["contestants"]["engine"]["documents_per_s"],
            "h100-long": gpu["1x100x512"]["contestants"]["engine"]["documents_per_s"],
            "cpu": cpu["throughput 2x16x128"]["contestants"]["engine"]["documents_per_s"],
            "mini-cpu": mini["pairs"] / mini["scoring"]["2 threads"]["median_ms"] * 1000,
        },
        rel=0.005,
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "at least one object"),
        ("{", "is no JSON"),
        ('[{"name": "x"}]', "documents_per_s"),
        (None, "cannot be read"),
    ],
)
def test_a_file_with_other_things_in_it_is_refused(tmp_path, content, message):
    path = tmp_path / "measured.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InvalidInputError, match=message):
        read_speeds(path)


# --- the simulation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_one_at_a_time_waits_as_long_as_pollaczek_and_khinchine_say(load):
    """Requests at random moments, each a second long: the mean wait is load / (2 (1 - load))."""
    found = simulate(poisson_arrivals(load, 40_000, seed=4), ALONE)

    assert found.latencies_s.mean() == pytest.approx(1 + load / (2 * (1 - load)), rel=0.06)
    assert found.busy == pytest.approx(load, rel=0.03)
    assert found.throughput_per_s == pytest.approx(load, rel=0.03)


def test_what_waits_is_computed_in_one_pass():
    """The first alone from 0 to 1, the two that came meanwhile together, from 1 to 2.5."""
    times = ServerTimes(pass_s=[1.0, 1.5], most_in_a_pass=4)
    found = simulate(np.array([0.0, 0.2, 0.4]), times)

    assert found.latencies_s.tolist() == pytest.approx([1.0, 2.3, 2.1])
    assert found.mean_pass == 1.5


def test_passes_that_were_not_measured_grow_by_the_slope_of_all_that_were():
    """By hand: 1, 2, 3, 3 rise by 0.7 on average, though not at all between the last two."""
    assert ServerTimes(pass_s=[1.0, 2.0, 3.0, 3.0], most_in_a_pass=6).pass_times().tolist() == pytest.approx(
        [1.0, 2.0, 3.0, 3.0, 3.7, 4.4]
    )
    assert ServerTimes(pass_s=[1.0, 2.0, 3.0], most_in_a_pass=2).pass_times().tolist() == [1.0, 2.0]


def test_a_trace_may_begin_at_any_second():
    """Ten requests of a second, two seconds apart, keep a server half busy, whatever the clock says."""
    found = simulate(1.8e9 + 2.0 * np.arange(10), ALONE)

    assert found.busy == pytest.approx(10 / 19)
    assert found.latencies_s.tolist() == pytest.approx([1.0] * 9)


def test_outages_that_overlap_end_with_the_last():
    """Away from 1 to 5, told in any order: what comes at 3.5 finds nobody, although another outage ended at 3."""
    arrivals = np.array([0.0, 3.5, 5.5])
    for at in ([(0, 1.5, 5.0), (0, 1.2, 3.0)], [(0, 2.0, 3.0), (0, 1.2, 5.0)]):
        assert simulate(arrivals, ALONE, failures=Failures(at=at)).lost == 1


def test_reading_waking_and_holding_take_their_time():
    """0.5 to wake and 0.1 to read; the second is read while the pass goes on, which then ends half of 0.4 later."""
    times = ServerTimes(pass_s=[1.0], most_in_a_pass=1, front_s=0.1, wake_s=0.5, held_s=0.4)
    found = simulate(np.array([0.0, 1.0]), times)

    assert found.latencies_s.tolist() == pytest.approx([0.6 + 1.0 + 0.2, 1.8 + 1.0 + 0.2 - 1.0])


def test_the_least_busy_server_is_asked():
    found = simulate(np.array([0.0, 0.1, 0.2, 1.05]), ALONE, n_servers=3)

    assert found.latencies_s.tolist() == pytest.approx([1.0, 1.0, 1.0, 1.0])


def test_what_a_dead_server_had_is_repeated_elsewhere_and_nothing_is_lost():
    arrivals, away = poisson_arrivals(1.0, 2_000, seed=1), [(0, start, start + 9.0) for start in range(500, 1500, 100)]
    calm = simulate(arrivals, ALONE, n_servers=2)
    found = simulate(arrivals, ALONE, n_servers=2, failures=Failures(at=away, notice_s=0.5))

    assert found.lost == calm.lost == 0
    assert found.repeated >= 1
    assert found.percentile_s(99) > calm.percentile_s(99)


def test_requests_that_no_server_answers_are_lost_and_too_many_are_refused():
    gone = simulate(np.arange(10.0), ALONE, failures=Failures(at=[(0, 4.5, 60.0)]))
    assert (gone.lost, len(gone.latencies_s)) == (6, 3)  # the first, which was answered, is not counted

    times = ServerTimes(pass_s=[1.0], most_in_a_pass=1, max_wait_s=4.0, patience=2)
    crowd = simulate(np.zeros(20), times)
    assert crowd.refused == 15  # of 20, but for the first two, which are not counted
    assert crowd.lost == 0


def test_the_same_arguments_give_the_same_traffic():
    times = ServerTimes(pass_s=[0.02], spread=[0.8, 1.0, 1.3])
    failures = Failures.random(4, 10.0, every_s=3.0, away_s=0.5, seed=2)
    one, two = (
        simulate(poisson_arrivals(120, 1_000, seed=9), times, n_servers=4, failures=failures, seed=3) for _ in range(2)
    )

    assert one.as_dict() == two.as_dict()
    assert failures.at


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: simulate(np.array([2.0, 1.0]), ALONE), "ascending"),
        (lambda: simulate(np.array([]), ALONE), "at least one"),
        (lambda: simulate(np.array([1.0]), ALONE, failures=Failures(at=[(1, 0, 1)])), "server 1"),
        (lambda: simulate(np.array([1.0]), ALONE, failures=Failures(at=[(0, 2, 1)])), "end after they begin"),
        (lambda: ServerTimes(pass_s=[]), "pass_s"),
        (lambda: ServerTimes(pass_s=[1.0, 0.9], most_in_a_pass=20), "pass_s must be ascending, not .1.0, 0.9."),
        (lambda: ServerTimes(pass_s=[1.0], held_s=-1), "held_s"),
        (lambda: poisson_arrivals(0, 5, seed=1), "requests_per_s"),
    ],
)
def test_a_wrong_simulation_is_refused(call, message):
    with pytest.raises(InvalidInputError, match=message):
        call()


def test_a_machines_passes_lie_between_a_lone_request_and_a_full_one():
    """By hand: 10 documents at 100 a second are 0.1 s, a lone request 0.13; four fit a pass, which takes 0.4 in all."""
    speed = replace(SPEED, documents_per_s=100.0, request_s=0.03, token_budget=4 * 10 * 128)
    times = server_times(speed, documents=10, tokens=128)

    assert times.pass_times().tolist() == pytest.approx([0.13, 0.22, 0.31, 0.4])
    assert times.requests_per_s == pytest.approx(10)
    assert server_times(SPEED, documents=10, tokens=128).pass_times().tolist() == pytest.approx([0.01])


# --- the command -------------------------------------------------------------------------------------------------------


def plan(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["plan", *arguments])
    if done.exception is not None:
        raise done.exception
    return done.output


def test_the_command_shows_the_arithmetic_line_by_line():
    printed = plan("--qps", "20", "--docs", "100", "--tokens", "128", "--price", "2", "--documents-per-second", "500")

    assert "20 requests/s x 100 documents = 2,000 documents/s" in printed
    assert "2,000 / 350 = 5.71, so 6" in printed
    assert "12.00 / (20 x 3,600) x 1,000,000 = 166.67" in printed


@pytest.mark.heavy
def test_the_command_adds_machines_until_the_wait_is_short_enough(tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps([{**{k: getattr(SPEED, k) for k in SPEED.__slots__}}]))
    arguments = ("--qps", "50", "--docs", "100", "--tokens", "128", "--measured", str(tmp_path / "mine.json"), "--json")
    plain, short = (json.loads(plan(*arguments, *more)) for more in (["--simulate"], ["--p99", "0.12"]))

    assert short["machines"] > plain["machines"] == 8
    assert "by simulation" in "".join(short["lines"])
    with pytest.raises(InvalidInputError, match="cannot be kept"):
        plan(*arguments, "--p99", "0.05")


def test_failures_are_simulated_and_machines_added_until_they_do_not_matter():
    """One of two machines is away for good: its requests go elsewhere; a single one's are lost."""
    arguments = ("--qps", "4", "--docs", "10", "--tokens", "128", "--documents-per-second", "100", "--json")
    alone, calm, rough = (
        json.loads(plan(*arguments, *more))
        for more in (
            ["--failures", "1", "--away", "900"],
            ["--p99", "0.4"],
            ["--failures", "2", "--away", "900", "--p99", "0.4"],
        )
    )

    assert alone["machines"] == 1
    assert alone["simulated"]["lost"] > 0
    assert f"{alone['simulated']['lost']:,} lost" in alone["lines"][-1]
    assert rough["simulated"]["lost"] == calm["simulated"]["lost"] == 0
    assert rough["machines"] > calm["machines"]
    assert rough["simulated"]["p99_ms"] <= 400
    with pytest.raises(InvalidInputError, match="--away must be a number of seconds, 0 or more, not nan"):
        plan(*arguments, "--failures", "1", "--away", "nan")


def test_the_wait_is_kept_while_the_spare_machines_are_away(tmp_path):
    """One more request at each moment than two machines take: a third is needed, and the two spare ones come on top."""
    trace = tmp_path / "trace"
    trace.write_text("\n".join(str(float(i // 3)) for i in range(300)))
    arguments = ("--qps", "3", "--docs", "250", "--tokens", "128", "--documents-per-second", "500", "--price", "1")
    found, alone = (
        json.loads(plan(*arguments, "--busy", "1", "--trace", str(trace), "--p99", "0.6", "--json", *more))
        for more in (["--spare", "2"], [])
    )

    assert (found["machines"], alone["machines"]) == (5, 3)
    assert (found["busy"], found["busy_without_spare"]) == (pytest.approx(0.3), pytest.approx(0.5))
    assert found["cost_per_hour"] == 5
    assert "machines for 0.6 s: 3 by simulation, 50% busy; and 2 spare: 5, 30% busy" in found["lines"]
    assert "on 3 machines, the spare away" in found["lines"][-1]


def test_every_machine_gets_enough_requests_that_queues_can_form(monkeypatch):
    """50 machines, 20 requests of each, of which a tenth fills the queues; and none are drawn for too many machines."""
    monkeypatch.setattr("qwen_rerank.cli.plan._SIMULATED", 100)
    arguments = ("--docs", "1", "--tokens", "128", "--documents-per-second", "1", "--busy", "1", "--simulate")

    assert "over 900 requests on 50 machines" in plan("--qps", "50", *arguments)
    with pytest.raises(InvalidInputError, match="1000000000 machines are too many to simulate"):
        plan("--qps", "1e9", *arguments)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with a name")
def test_a_trace_is_a_regular_file_of_bounded_size(tmp_path, monkeypatch):
    """A pipe would be waited for for ever; a packed file could become any size."""
    arguments = ("--qps", "10", "--docs", "10", "--tokens", "128", "--trace")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "trace.gz").write_bytes(gzip.compress(b"1\n2\n"))
    (tmp_path / "trace").write_text("1\n2\n3\n")
    monkeypatch.setattr("qwen_rerank.cli.plan._MOST_TRACE_BYTES", 5)
    for name, message in [("pipe", "no regular file"), ("trace.gz", "larger than 5"), ("trace", "larger than 5 bytes")]:
        with pytest.raises(InvalidInputError, match=message):
            plan(*arguments, str(tmp_path / name))
    monkeypatch.undo()
    with pytest.raises(InvalidInputError, match="one number of seconds a line"):
        plan(*arguments, str(tmp_path / "trace.gz"))


def test_the_command_takes_a_trace(tmp_path):
    (tmp_path / "trace").write_text("\n".join(str(i / 10) for i in range(100)))
    assert "over 90 requests" in plan(
        "--qps", "10", "--docs", "10", "--tokens", "128", "--trace", str(tmp_path / "trace")
    )
    (tmp_path / "trace").write_text("soon")
    with pytest.raises(InvalidInputError, match="one number of seconds a line"):
        plan("--qps", "10", "--docs", "10", "--tokens", "128", "--trace", str(tmp_path / "trace"))
