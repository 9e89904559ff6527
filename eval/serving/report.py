"""The figures as one table."""

from __future__ import annotations

from typing import Any


def table(reports: dict[str, dict[str, Any]]) -> str:
    """Return the reports of `clients`, `overload`, `busy` and `sigterm`, as far as there are any, as Markdown."""
    lines = ["| measured | figure | bar | met |", "| --- | --- | --- | --- |"]
    for name, rows in (("clients", _clients), ("overload", _overload), ("busy", _overload), ("sigterm", _sigterm)):
        if name in reports:
            for measured, figure, bar, met in rows(reports[name]["figures"]):
                lines.append(f"| {measured} | {figure} | {bar} | {'yes' if met else 'NO'} |")
    for name in ("overload", "busy"):
        if name in reports:
            lines += ["", *_loads(reports[name]["figures"])]
    for name, report in reports.items():
        hardware, versions = report["hardware"], report["versions"]
        lines += [
            "",
            f"{name}: `{report['command']}`, {report['date']}, {hardware['cpu']}, {hardware['cores']} cores shared by server "
            f"and clients, load average before {hardware['load_average_before']:.1f}; Python {versions['python']}, uvicorn "
            f"{versions['uvicorn']}, h11 {versions['h11']}, fastapi {versions['fastapi']}. {report['note']}".rstrip(),
        ]
    return "\n".join(lines) + "\n"


def _clients(found: dict[str, Any]) -> list[tuple[str, str, str, bool]]:
    return [
        (
            f"{found['clients']} clients at once, {found['requests']} requests: exactly their own answer",
            f"{found['own_answer']}",
            f"{found['requests']}",
            found["met"],
        )
    ]


def _overload(found: dict[str, Any]) -> list[tuple[str, str, str, bool]]:
    last, bars = found["loads"][-1], found["bars"]
    busy = found.get("busy_processes", 0)  # older reports have none
    load = f"{last['factor']:g}x capacity{' beside a busy process' if busy else ''}"
    goodput, late = (">= 90 %", "–") if busy else (">= 95 %", "<= 50 ms")
    return [
        (f"goodput at {load}, of its peak", f"{found['goodput_at_overload_of_peak']:.1%}", goodput, bars["goodput"]),
        (f"rejections at {load}, p99", f"{found['rejected_p99_ms_at_overload']} ms", late, bars["rejections"]),
        *_refusals(found),
        *_health(found),
        ("after it, a request is let in within", f"{last['admitted_again_after_s']} s", "<= 2 s", bars["recovery"]),
    ]


def _refusals(found: dict[str, Any]) -> list[tuple[str, str, str, bool]]:
    kinds = found.get("refusal_cpu_ms", {})  # older reports have none
    return [(f"CPU time of a refusal: {kind}", f"{ms} ms", "<= 5 ms", ms <= 5) for kind, ms in kinds.items()]


def _health(found: dict[str, Any]) -> list[tuple[str, str, str, bool]]:
    loads = [load for load in found["loads"] if "health_asked" in load]  # older reports have none
    if not loads:
        return []
    asked, missed = (sum(load[f"health_{what}"] for load in loads) for what in ("asked", "unanswered"))
    return [(f"{asked} health checks under all loads: not answered within 2 s", f"{missed}", "0", missed == 0)]


def _sigterm(found: dict[str, Any]) -> list[tuple[str, str, str, bool]]:
    under_way = found["answered_after_the_signal"]
    return [
        (
            f"{found['shutdowns']} SIGTERMs under load, {under_way} requests under way at the signal: lost",
            f"{found['lost']}",
            "0",
            found["met"],
        )
    ]


def _loads(found: dict[str, Any]) -> list[str]:
    lines = [
        f"{'Beside a busy process. ' if found.get('busy_processes') else ''}Capacity {found['capacity_per_s']} requests/s, set by the stub engine ({1e3 * found['service_s']:g} ms a request, one "
        f"at a time); HTTP alone does {found['http_ceiling_per_s']} requests/s here, so the figures tell of admission. Times "
        "count from the moment a request was due.",
        "",
        "| offered | per s | answered per s | answered p50 / p99, ms | rejected | rejected p50 / p99, ms | generator late p99, ms |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for load in found["loads"]:
        lines.append(
            f"| {load['factor']:g}x | {load['offered_per_s']} | {load['goodput_per_s']} | {_pair(load['answered_ms'])} | "
            f"{load['rejected']} | {_pair(load['rejected_ms'])} | {load['generator_late_ms']['p99']} |"
        )
    return lines


def _pair(ms: dict[str, float]) -> str:
    return f"{ms['p50']:.1f} / {ms['p99']:.1f}" if ms else "–"
