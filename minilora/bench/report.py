"""The report as text."""

from __future__ import annotations

from typing import Any

UNITS = {"step": "one LoRA step (forward, backward, AdamW)", "sweep": "one step of all adapters", "decode": "greedy generation"}


def table(report: dict[str, Any]) -> str:
    """A block of lines for each case."""
    m = report["machine"]
    lines = [f"{m['cpu']}, {m['cores']} cores, {m['threads']} threads, Python {m['python']}, NumPy {m['numpy']}"
             + (f", products by MKL {m['mkl']}" if "mkl" in m else "")]
    lines += [f"{m['gpu']}, CuPy {m['cupy']}"] if "gpu" in m else []
    lines += [", ".join(f"{name} {version}" for name, version in report["versions"].items()), ""]
    for name, case in report["cases"].items():
        lines += [*block(name, case), ""]
    return "\n".join(lines)


def block(name: str, case: dict[str, Any]) -> list[str]:
    """The lines of one case."""
    ours = case["minilora"]
    lines = [
        f"{name}: {describe(case)}",
        f"{'':14}{'median':>11}{'10-90 %':>20}{'tokens/s':>10}{'peak memory':>13}{'of it, the job':>16}",
    ]
    for label, side in (("minilora", ours), ("PyTorch + PEFT", case["torch"])):
        spread = f"{side['p10_ms']:.1f} - {side['p90_ms']:.1f}"
        lines.append(f"{label:14}{side['median_ms']:8.1f} ms{spread:>20}{side['tokens_per_second']:10.0f}"
                     f"{side['peak_mb']:10.0f} MB{side['peak_mb'] - side['idle_mb']:13.0f} MB")
    same = {"step": "losses agree", "sweep": "losses agree", "decode": "tokens and logits agree"}[case["kind"]]
    if case.get("first_different_token") is not None:
        same = f"tokens agree up to number {case['first_different_token']}, logits up to there"
    top = ", ".join(f"{op} {share:.0%}" for op, share in list(case["by_op"].items())[:8])
    return [
        *lines,
        f"ratio of medians {case['ratio']:.2f}, of memory {case['memory_ratio']:.2f} ({same} to {case['difference']:.1e})",
        f"GEMM floor {case['gemm_floor_ms']:.1f} ms ({case['gemm_gflop']:.1f} GFLOP at "
        f"{1e3 * case['gemm_gflop'] / case['gemm_floor_ms']:.0f} GFLOP/s), "
        f"{100 * case['gemm_floor_ms'] / ours['median_ms']:.0f} % of minilora's step",
        f"where minilora's time goes: {top}",
    ]


def describe(case: dict[str, Any]) -> str:
    """What the case measures, in a few words."""
    what = f"{UNITS[case['kind']]}, {case['tokens_per_step']} tokens"
    if case["kind"] == "decode":
        return f"{what}, {'adapter merged' if case['adapters'] else 'no adapter'}"
    adapters = f", {case['adapters']} adapters" if case["kind"] == "sweep" else ""
    return f"{what}{adapters}, {case['trainable']} trainable" + (", TF32" if case["tf32"] else "")
