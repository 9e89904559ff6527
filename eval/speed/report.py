"""The figures as a table and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def table(report: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    lines = [
        f"{report['model']}, {report['dtype']}, {report['hardware'].get('gpu', report['hardware']['cpu'])}, "
        f"{report['hardware']['threads']} threads, matmul peak "
        + ", ".join(f"{name} {peak / 1e12:.3g}" for name, peak in report["peak_flops"].items())
        + " TFLOP/s",
        "",
        "| workload | contestant | documents/s | ms a query | of peak | MiB beside weights | engine is |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, workload in report["workloads"].items():
        for contestant, result in workload["contestants"].items():
            peak = result["peak_bytes_beside_weights"]
            over = workload.get("engine_over", {}).get(contestant)
            lines.append(
                f"| {name} | {contestant} | {result['documents_per_s']:.3g} | {result['ms_p50']:.0f} | "
                f"{100 * result['share_of_peak']:.0f} % | {'' if peak is None else f'{peak / 2**20:.0f}'} | "
                f"{f'×{over:.2f}' if over else ''} |"
            )
    for n, result in report.get("callers", {}).items():
        lines.append(f"| {n} callers | engine | {result['documents_per_s']:.3g} | {result['ms_p50']:.0f} | | | |")
    return "\n".join(lines)


def write_plot(report: dict[str, Any], path: Path) -> None:
    """Draw documents per second, each workload relative to sentence-transformers or its first contestant."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return  # a bare machine still gets the figures
    names = sorted({name for workload in report["workloads"].values() for name in workload["contestants"]})
    figure, axis = pyplot.subplots(figsize=(11, 0.9 + 0.75 * len(report["workloads"])))
    height, colours = 0.8 / max(1, len(names)), pyplot.get_cmap("tab20").colors
    for row, workload in enumerate(report["workloads"].values()):
        results = workload["contestants"]
        base = results.get("sentence-transformers", next(iter(results.values())))["documents_per_s"]
        for i, name in enumerate(names):
            if name in results:
                axis.barh(row + i * height, results[name]["documents_per_s"] / base, height, color=colours[i])
    for i, name in enumerate(names):
        axis.barh(0, 0, color=colours[i], label=name)
    axis.set_yticks([row + 0.4 - height / 2 for row in range(len(report["workloads"]))], list(report["workloads"]))
    axis.invert_yaxis()
    axis.set_xlabel("documents/s, sentence-transformers = 1 (where it ran)")
    axis.set_title(f"{report['model']}, {report['dtype']}", fontsize=9)
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
