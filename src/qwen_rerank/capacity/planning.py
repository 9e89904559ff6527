"""A plan: from requests a second and measured speeds to machines, how busy they are, and what a million reranks cost."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from qwen_rerank.bounded_json import loads
from qwen_rerank.capacity.queueing import ServerTimes
from qwen_rerank.checks import check_count, check_text
from qwen_rerank.errors import InvalidInputError
from qwen_rerank.regular_files import open_regular

_MOST_BYTES = 1 << 20
_SHIPPED = "measured.json"
_FIELDS = ("name", "what", "documents_per_s", "tokens", "source")
_MORE_FIELDS = ("request_s", "token_budget")


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """The measured speed of one machine.

    Attributes:
        name: What `--on` takes.
        what: Model, format and hardware.
        documents_per_s: Documents a second of one machine that is never without work.
        tokens: Of each document.
        source: Where the figure is from.
        request_s: Seconds that a lone request takes beyond its share of that speed; simulated, no part of the arithmetic.
        token_budget: Tokens of one engine pass, into which waiting requests go together; None computes one at a time.
    """

    name: str
    what: str
    documents_per_s: float
    tokens: int
    source: str
    request_s: float = 0.0
    token_budget: int | None = None

    def __post_init__(self) -> None:
        for name in ("name", "what", "source"):
            check_text(name, getattr(self, name))
        check_count("tokens", self.tokens)
        _check_amount("documents_per_s", self.documents_per_s)
        if not _is_number(self.request_s) or not 0 <= self.request_s < math.inf:
            raise InvalidInputError(f"request_s must be a number of seconds, 0 or more, not {self.request_s!r}.")
        if self.token_budget is not None:
            check_count("token_budget", self.token_budget)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The machines that a load needs, and what they cost.

    Attributes:
        documents_per_s: Of the load.
        machine_documents_per_s: Of one machine, at the load's tokens.
        machines: That are needed, spare ones included.
        busy: Share of their time in which they compute while all of them run.
        busy_without_spare: The same when the spare ones are away.
        cost_per_hour: Of all machines; None without a price.
        cost_per_million: Of a million reranks, one query with its documents each; None without a price.
        lines: The arithmetic, name and text of each line.
        simulated: Figures of the simulated traffic; None where none was simulated.
    """

    documents_per_s: float
    machine_documents_per_s: float
    machines: int
    busy: float
    busy_without_spare: float
    cost_per_hour: float | None
    cost_per_million: float | None
    lines: list[tuple[str, str]]
    simulated: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return {**asdict(self), "lines": [f"{name}: {text}" for name, text in self.lines]}


def make_plan(
    speed: Speed,
    *,
    requests_per_s: float,
    documents: int,
    tokens: int,
    price: float | None = None,
    busy: float = 0.7,
    spare: int = 0,
) -> Plan:
    """Return how many machines a load needs, with the arithmetic.

    Args:
        speed: Of one machine.
        requests_per_s: Queries a second, each with its documents.
        documents: Of each query.
        tokens: Of each document.
        price: Of a machine for an hour, in any currency; None for no costs.
        busy: Share of its time that a machine may compute, above 0 and at most 1. The rest is what keeps waiting short.
        spare: Machines that may be away without others being busier than that.

    Raises:
        InvalidInputError: If an argument is wrong.
    """
    _check_amount("requests_per_s", requests_per_s)
    check_count("documents", documents)
    check_count("tokens", tokens)
    if price is not None and not (_is_number(price) and 0 <= price < math.inf):
        raise InvalidInputError(f"price must be a number, 0 or more, of a machine for an hour, not {price!r}.")
    if not _is_number(busy) or not 0 < busy <= 1:
        raise InvalidInputError(f"busy must be a share above 0 and at most 1, such as 0.7, not {busy!r}.")
    if isinstance(spare, bool) or not isinstance(spare, int) or spare < 0:
        raise InvalidInputError(f"spare must be a number of machines, 0 or more, not {spare!r}.")
    load = requests_per_s * documents
    machine = speed.documents_per_s * speed.tokens / tokens
    allowed = machine * busy
    if not math.isfinite(load / allowed):
        raise InvalidInputError(f"{load:g} documents a second are more than any number of machines can be told for.")
    needed = max(1, math.ceil(load / allowed - 1e-9))  # 2.0000000001 by rounding are 2
    machines = needed + spare
    lines = [
        ("load", f"{_n(requests_per_s)} requests/s x {_n(documents)} documents = {_n(load)} documents/s"),
        (
            "one machine, measured",
            f"{_n(speed.documents_per_s)} documents/s of {_n(speed.tokens)} tokens ({speed.what}; {speed.source})",
        ),
    ]
    if tokens != speed.tokens:
        scaled = f"{_n(speed.documents_per_s)} x {_n(speed.tokens)} / {_n(tokens)} = {_n(machine)} documents/s"
        lines.append((f"at {_n(tokens)} tokens, by arithmetic", f"{scaled}; measure it where it matters"))
    lines += [
        (f"at most {busy:.0%} busy", f"{_n(machine)} x {busy:g} = {_n(allowed)} documents/s"),
        (
            "machines",
            f"{_n(load)} / {_n(allowed)} = {load / allowed:.2f}, so {_n(needed)}" + _and_spare(spare, machines),
        ),
        ("busy", f"{_n(load)} / ({_n(machines)} x {_n(machine)}) = {load / (machines * machine):.0%}"),
    ]
    if spare:
        lines.append(
            ("busy without the spare", f"{_n(load)} / ({_n(needed)} x {_n(machine)}) = {load / (needed * machine):.0%}")
        )
    per_hour = per_million = None
    if price is not None:
        per_hour = machines * price
        per_million = per_hour / (requests_per_s * 3600) * 1e6
        lines += [
            ("cost an hour", f"{_n(machines)} x {price:g} = {per_hour:,.2f}"),
            (
                "cost of a million reranks",
                f"{per_hour:,.2f} / ({_n(requests_per_s)} x 3,600) x 1,000,000 = {per_million:,.2f}",
            ),
        ]
    return Plan(
        documents_per_s=load, machine_documents_per_s=machine, machines=machines, busy=load / (machines * machine),
        busy_without_spare=load / (needed * machine), cost_per_hour=per_hour, cost_per_million=per_million, lines=lines,
    )  # fmt: skip


def server_times(speed: Speed, *, documents: int, tokens: int) -> ServerTimes:
    """Return the times of one machine in a simulation.

    A full pass takes its requests' shares of the speed, a pass of one `request_s` more than a share, and those between
    lie on the line: what a pass takes whatever is in it is shared by those that go together.
    """
    share = documents * tokens / (speed.documents_per_s * speed.tokens)
    together = 1 if speed.token_budget is None else max(1, speed.token_budget // (documents * tokens))
    step = share if together == 1 else max(0.0, share - speed.request_s / (together - 1))
    return ServerTimes(
        pass_s=[share + speed.request_s + step * more for more in range(min(2, together))],
        most_in_a_pass=together,
        max_wait_s=max(2.0, 100 * (share + speed.request_s)),
    )


def shipped_speeds() -> list[Speed]:
    """Return the speeds that were measured with this version of the package."""
    return _speeds(files("qwen_rerank.capacity").joinpath(_SHIPPED).read_bytes(), _SHIPPED)


def read_speeds(path: Path) -> list[Speed]:
    """Return the speeds of a JSON file: a list of objects with name, what, documents_per_s, tokens and source.

    Raises:
        InvalidInputError: If there is no such file, or something else is in it.
    """
    try:
        with open_regular(path) as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError as exc:
        raise InvalidInputError(f"{path} cannot be read ({exc.strerror or exc}).") from exc
    if len(data) > _MOST_BYTES:
        raise InvalidInputError(f"{path} has more than {_MOST_BYTES} bytes, which no list of measured speeds has.")
    return _speeds(data, str(path))


def choose_speed(speeds: list[Speed], name: str | None) -> Speed:
    """Return the speed of that name, or the first where none is named."""
    found = [speed for speed in speeds if name in (None, speed.name)]
    if not found:
        raise InvalidInputError(f"nothing measured is named {name!r}; there are {', '.join(s.name for s in speeds)}.")
    return found[0]


def _speeds(data: bytes, where: str) -> list[Speed]:
    try:
        rows = loads(data)
    except ValueError as exc:
        raise InvalidInputError(f"{where} is no JSON ({exc}).") from exc
    if (
        not isinstance(rows, list)
        or not rows
        or not all(isinstance(row, dict) and set(_FIELDS) <= set(row) <= {*_FIELDS, *_MORE_FIELDS} for row in rows)
    ):
        raise InvalidInputError(
            f"{where} must be a list of at least one object with {', '.join(_FIELDS)}, perhaps "
            f"{' and '.join(_MORE_FIELDS)}, and no more."
        )
    return [Speed(**row) for row in rows]


def _and_spare(spare: int, machines: int) -> str:
    return f"; and {_n(spare)} spare: {_n(machines)}" if spare else ""


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_amount(name: str, value: object) -> None:
    if not _is_number(value) or not 0 < value < math.inf:  # type: ignore[operator]
        raise InvalidInputError(f"{name} must be a number above 0, not {value!r}.")


def _n(value: float) -> str:
    """Return a number as people write it: 20,000 or 577.2 or 0.52."""
    if value >= 1000 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:,.1f}" if value >= 10 else f"{value:.3g}"
