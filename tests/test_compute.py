"""What is chosen for the machine, and the ways back when something is missing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

from agents.dqn import DQN
from backbones import compute
from backbones.compute import Compute, ComputeConfig, choose, copy_weights, guarded_compile
from runs import UserError
from tests.tools import batch_of, built, trained


def chosen(config: ComputeConfig, said: list[str], *, image: bool = True, updates: int = 10**6) -> Compute:
    before = torch.get_num_threads()
    try:
        return choose(config, image=image, updates=updates, say=said.append)
    finally:
        torch.set_num_threads(before)


def test_small_dense_nets_get_one_thread_and_fp32() -> None:
    found = chosen(ComputeConfig(device="cpu"), [], image=False, updates=1_000)
    assert found == Compute("cpu", "fp32", 1, False)


def test_a_compiled_update_of_a_dense_net_learns_on_two_threads_and_acts_on_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compute, "_can_compile", lambda device: True)
    monkeypatch.setattr(compute, "CORES", 8)
    found = chosen(ComputeConfig(device="cpu"), [], image=False)
    assert (found.compile, found.threads, found.threads_acting) == (True, 2, 1)


def test_flags_win() -> None:
    config = ComputeConfig(device="cpu", precision="fp32", threads=2, compile="off")
    assert chosen(config, []) == Compute("cpu", "fp32", 2, False, threads_acting=2)


def test_bf16_that_disagrees_falls_back_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(compute, "_cpu_has_bf16", lambda: True)
    monkeypatch.setattr(compute, "_compare_bf16", lambda device: (0.5, 0.5))
    assert chosen(ComputeConfig(device="cpu"), said).precision == "fp32"
    assert "50.0%" in said[0] and "fp32" in said[0]


def test_bf16_that_is_far_slower_falls_back_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(compute, "_cpu_has_bf16", lambda: True)
    monkeypatch.setattr(compute, "_compare_bf16", lambda device: (0.002, 9.0))
    assert chosen(ComputeConfig(device="cpu"), said).precision == "fp32"
    assert "9.0 times slower" in said[0]


def test_a_processor_without_bf16_computes_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "_cpu_has_bf16", lambda: False)
    assert chosen(ComputeConfig(device="cpu"), []).precision == "fp32"


def test_the_comparison_itself_is_close_to_fp32() -> None:
    if not compute._cpu_has_bf16():
        pytest.skip("no bf16 here")
    difference, _ = compute._compare_bf16("cpu")
    assert 1e-5 < difference < 0.02


def test_no_compiler_means_eager_and_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(compute.shutil, "which", lambda name: None)
    assert not chosen(ComputeConfig(device="cpu", precision="fp32"), said).compile
    assert "no C++ compiler" in said[0]


def test_a_compilation_that_fails_runs_the_function_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    calls: list[int] = []

    def broken(function: object, **_: object) -> object:
        def run(*arguments: int) -> int:
            raise RuntimeError("no toolchain")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    run = guarded_compile(lambda x: calls.append(x) or x + 1, said.append)
    assert run(1) == 2 and run(2) == 3
    assert calls == [1, 2] and len(said) == 1 and "RuntimeError" in said[0]


def test_an_error_of_the_function_itself_is_not_hidden() -> None:
    def wrong(x: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError("ours")

    with pytest.raises(ZeroDivisionError):
        guarded_compile(wrong, lambda line: None)(torch.ones(1))


def test_cuda_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda"):
        chosen(ComputeConfig(device="cuda"), [])


def test_copy_weights_is_exact_or_goes_part_of_the_way() -> None:
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    start = target.weight.detach().clone()
    copy_weights(source, target, 0.25)
    torch.testing.assert_close(target.weight, start + 0.25 * (source.weight - start))
    copy_weights(source, target)
    assert torch.equal(source.weight, target.weight)


@pytest.mark.skipif(not compute._can_compile("cpu"), reason="needs a C++ compiler")
def test_compiled_updates_are_the_eager_ones() -> None:
    """Two agents of one shape that differ in their settings: neither may run on the other's graph."""
    kinds = (dict(loss="huber", target_every=3), dict(loss="squared", double="off", noisy="factorised"))
    pairs = [
        [built(lr=1e-2, gamma=0.5, compute=Compute("cpu", "fp32", 1, on), **kind) for on in (False, True)]
        for kind in kinds
    ]
    for number, steps in enumerate((1, 3, 1, 5)):
        for pair in pairs:
            eager, compiled = (agent.update(batch_of(16 * steps, seed=number), steps) for agent in pair)
            assert eager.priority is not None and compiled.priority is not None
            torch.testing.assert_close(eager.priority, compiled.priority, rtol=1e-3, atol=1e-4)
    for eager, compiled in pairs:
        for a, b in zip(eager.online.parameters(), compiled.online.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_agent_learns_on_cuda(precision: str) -> None:
    losses = {}
    for device in ("cpu", "cuda"):
        agent = DQN(net={"hidden": (32,)}, lr=1e-3)
        kind = Compute(device, precision if device == "cuda" else "fp32", 1, False)
        space = spaces.Box(-1, 1, (3,), np.float32)
        agent.build(space, spaces.Discrete(2), kind, np.random.SeedSequence(0), print)
        updates = [agent.update(batch_of(16, seed=k)) for k in range(5)]
        losses[device] = [float(update.metrics["loss/td"]) for update in updates]
        agent.act(np.zeros((2, 3), np.float32), np.ones(2, bool), (), 10**6)
    np.testing.assert_allclose(losses["cuda"], losses["cpu"], rtol=0.05 if precision == "bf16" else 1e-3)


@pytest.mark.slow
def test_cartpole_is_solved_by_its_preset() -> None:
    """The preset's settings, shortened: 25,000 steps are enough for most seeds to balance to the end."""
    from agents.presets import PRESETS

    settings = dict(PRESETS["cartpole"].settings)
    for name in ("steps", "eval_every"):
        settings.pop(name)
    settings["net"] = {"hidden": settings.pop("hidden")}
    _, watch = trained("CartPole-v1", 50_000, seed=1, **settings)
    assert np.mean([r for _, r, _ in watch.episodes[-20:]]) > 300
