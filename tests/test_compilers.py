"""What is known of pairs of Triton and ptxas, and where it is said."""

import subprocess
from types import SimpleNamespace

import pytest
import torch

from bert_fast import compilers, env


@pytest.mark.parametrize(
    ("triton", "ptxas", "capability", "rules"),
    [
        ("3.7.1", "12.8.93", 80, {}),
        ("3.7.1", "12.8.93", 90, {"registers": False}),
        ("3.7.1", "13.1.80", 90, {"registers": False}),
        ("3.7.1", "13.3.33", 90, {}),
        ("3.9.0", "13.4.59", 90, {}),
        ("3.6.0", "12.8.93", 90, {"registers": False, "fences": True}),
        ("3.7.0", "12.8.93", 90, {"registers": False, "fences": True}),
        ("3.6.0", "13.4.59", 90, {"fences": False}),
        ("3.6.0", "12.9.86", 100, {"fences": True}),
        ("3.7.0", "13.1.80", 100, {"fences": False}),
        ("3.8.0", "13.3.33", 100, {"fences": False}),
        ("3.9.0", "13.4.59", 100, {}),
        ("3.10.0+git1234", "13.4.59", 120, {}),
    ],
)
def test_known_faults_of_a_pair(triton, ptxas, capability, rules):
    """Rule of the compile report -> whether it tolerates the fault."""
    assert {f.rule: f.tolerated for f in compilers.known_faults(triton, ptxas, capability)} == rules


@pytest.fixture
def installed(monkeypatch):
    """Pretends that versions of Triton and, for every capability, of ptxas are installed."""

    def install(triton, ptxas):
        monkeypatch.setattr(compilers, "triton_version", lambda: triton)
        monkeypatch.setattr(compilers, "ptxas_version", ptxas.get)

    return install


def test_the_environment_names_the_assemblers_and_warns_of_the_devices_present(installed, monkeypatch, capsys):
    installed("3.6.0", {80: "12.8.93", 90: "13.1.80", 100: "13.1.80"})
    monkeypatch.setattr(env.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(env.torch.cuda, "get_device_name", lambda number: f"device {number}")
    for capability, warned in ((90, 2), (80, 0)):
        monkeypatch.setattr(env.torch.cuda, "get_device_capability", lambda number, c=capability: divmod(c, 10))
        facts = env.environment()
        assert facts["versions"]["ptxas"] == "12.8.93 for 8.0, 13.1.80 for 9.0 and 10.0"
        assert len(facts["warnings"]) == warned  # one for both devices
        env.main()
        said = capsys.readouterr().out
        assert said.count("warning: triton 3.6.0 with ptxas 13.1.80 on 9.0: ") == warned
    assert any("never use it" in line for line in compilers.warnings_for([90]))


@pytest.mark.parametrize(
    ("triton", "later"), [("3.8.0", False), ("3.9.0", True), ("3.10.0+git1234", True), (None, False)]
)
def test_which_release_of_triton_is_installed(installed, triton, later):
    installed(triton, {})
    assert compilers.since(3, 9) is later


@pytest.mark.parametrize("later", [False, True])
def test_attention_copies_nothing_ahead_where_it_would_spill(monkeypatch, later):
    """By Triton 3.8 on compute capability 10.0 the forward of heads of 64 spills with two stages, and no other."""
    attention = pytest.importorskip("bert_fast.kernels.attention")
    monkeypatch.setattr(attention, "_SINCE_3_8", later)
    stages = {
        (capability, size): attention._launch_config("fwd", capability, size, torch.bfloat16, 512)["num_stages"]
        for capability in (80, 90, 100)
        for size in (32, 64)
    }
    expected = {(80, 32): 2, (80, 64): 2, (90, 32): 3, (90, 64): 3, (100, 32): 2, (100, 64): 1 if later else 2}
    assert stages == expected


def test_without_triton_nothing_is_known(installed):
    installed(None, {})
    assert compilers.assemblers() == "not installed"
    assert compilers.warnings_for([90]) == []


@pytest.mark.parametrize(("said", "version"), [("... release 13.4, V13.4.59\nBuild ...", "13.4.59"), ("?", None)])
def test_the_version_is_what_the_assembler_itself_says(monkeypatch, said, version):
    pytest.importorskip("triton.backends.nvidia.compiler")
    from triton.backends.nvidia import compiler

    monkeypatch.setattr(compiler, "get_ptxas", lambda capability: SimpleNamespace(path=f"ptxas for {capability}"))
    monkeypatch.setattr(subprocess, "run", lambda command, **_: SimpleNamespace(stdout=said, command=command))
    compilers.ptxas_version.cache_clear()
    try:
        assert compilers.ptxas_version(90) == version
    finally:
        compilers.ptxas_version.cache_clear()
