"""What facts mean, on made-up machines."""

from __future__ import annotations

import pytest

from fp8lm.doctor.facts import Accelerators, Facts, Gpu, Package
from fp8lm.doctor.judge import judge, judge_nccl, judge_package, judge_python, problems
from fp8lm.doctor.machine import plan_execution

GIB = 1 << 30
H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 80 * GIB)
L40S = Gpu("NVIDIA L40S", (8, 9), 46 * GIB)
A100 = Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 80 * GIB)
DISGUISED = Gpu("NVIDIA H100 by another name", (8, 6), 80 * GIB)
META = "RuntimeError: Found empty `transformer-engine` meta package installed."


def package(name, version="1.0", tested="", required=True, error=None):
    return Package(name, required, version is not None, version, tested, error)


TORCH = package("torch", "2.13.0", ">=2.11,<2.15")
MEGATRON = package("megatron-core", "0.16.1", ">=0.16.1,<0.20")


def machine(*gpus, packages=(TORCH, MEGATRON), **keys):
    keys = {"cuda": "13.0", "driver": "580.95", "nccl": (2, 28, 9), **keys}
    accelerators = Accelerators(gpus, **keys)
    execution = plan_execution(accelerators.gpus, accelerators.cuda)
    return Facts("0.1.0", "", "3.12.3", ">=3.11", packages, accelerators, execution)


def remark(facts, subject, found=None):
    (remark,) = (
        f.remark for f in judge(facts) if f.subject == subject and found in (None, f.found)
    )
    return remark


def test_h100():
    facts = machine(H100, H100)
    assert problems(judge(facts)) == []
    assert "compute capability 9.0, 80 GiB" in remark(facts, "GPU 1")
    assert "_scaled_mm" in remark(facts, "cuda:1", "GEMM")
    assert "BF16" in remark(facts, "cuda:0", "attention")
    assert remark(facts, "NCCL").endswith("fp8_sum adds in NCCL")


def test_l40s_has_fp8_and_no_reduction_of_it():
    facts = machine(L40S)
    assert problems(judge(facts)) == []
    assert "_scaled_mm" in remark(facts, "cuda:0", "GEMM")
    assert "fp8_sum adds in a ring" in remark(facts, "NCCL")


@pytest.mark.parametrize("gpus", [(H100,), (H100, H100)])
def test_gpus_without_nccl_are_a_problem(gpus):
    (problem,) = problems(judge(machine(*gpus, nccl=None)))
    assert problem.startswith("this PyTorch has no NCCL") and "train.device=cpu" in problem


def test_amd_gpus_are_refused():
    """They answer for CUDA, with a compute capability of 9 and more."""
    facts = machine(Gpu("AMD Instinct MI300X", (9, 4), 192 * GIB), cuda=None, rocm="6.4")
    (problem,) = problems(judge(facts))
    assert "torch 2.13.0: this PyTorch is a ROCm build" in problem and "NVIDIA" in problem
    assert not {"NCCL", "CUDA"} & {finding.subject for finding in judge(facts)}


@pytest.mark.parametrize("driver", [None, "580.95"])
def test_a_rocm_build_without_a_gpu_trains_on_the_cpu(driver):
    facts = machine(cuda=None, rocm="6.4", driver=driver)
    assert problems(judge(facts)) == []
    assert "training runs on the CPU" in remark(facts, "GPU")


@pytest.mark.parametrize("gpu", [A100, DISGUISED])
def test_a_gpu_is_judged_by_its_capability(gpu):
    (problem,) = problems(judge(machine(H100, gpu)))
    assert problem.startswith(f"cuda:1: {gpu.name} has compute capability 8.")
    assert problem.endswith("use another GPU or train.device=cpu")


def test_cpu():
    facts = machine(cuda=None, driver=None, nccl=None)
    assert problems(judge(facts)) == []
    assert remark(facts, "GPU").startswith("training runs on the CPU")
    assert "BF16 GEMM" in remark(facts, "cpu", "GEMM")
    assert "gloo" in remark(facts, "NCCL")


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        (dict(cuda=None), "torch 2.13.0 is no CUDA build, and an NVIDIA driver is here"),
        (dict(), "driver 580.95 may be too old for CUDA 13.0, or CUDA_VISIBLE_DEVICES"),
    ],
)
def test_a_gpu_that_torch_does_not_see(keys, text):
    assert text in remark(machine(**keys), "GPU")


def test_cuda_in_a_bad_state_is_a_problem():
    (problem,) = problems(judge(machine(error="CUDA error: device unavailable")))
    assert problem.startswith("CUDA fails (CUDA error: device unavailable): check")


@pytest.mark.parametrize(
    ("version", "gpus", "able"),
    [
        ((2, 24, 3), (H100,), True),
        ((2, 23, 4), (H100,), False),
        ((3, 0), (L40S,), False),
        ((2, 28, 9), (H100, L40S), False),
        ((2, 28, 9), (), False),
    ],
)
def test_nccl(version, gpus, able):
    assert judge_nccl(version, gpus).remark.endswith("fp8_sum adds in NCCL") is able


@pytest.mark.parametrize(
    ("version", "status"),
    [
        ("2.10.0", "problem"),
        ("2.11.0", "ok"),
        ("2.13.0+cpu", "ok"),
        ("2.13.0a0+8145d630e8.nv26.6", "ok"),  # NVIDIA's builds are development versions
        ("2.14.0a0+4fdf77b940.nv26.8", "ok"),
        ("2.15.0a0+4fdf77b940.nv26.11", "note"),
        ("2.15.0", "note"),
        ("unknown", "ok"),
    ],
)
def test_versions_of_torch(version, status):
    finding = judge_package(package("torch", version, ">=2.11,<2.15"))
    assert finding.status == status
    if status == "problem":
        assert finding.remark.startswith("torch 2.10.0 ")
        assert finding.remark.endswith('pip install "torch>=2.11,<2.15"')


def test_python():
    assert judge_python("3.12.3", ">=3.11").status == "ok"
    new = judge_python("3.14.0", ">=3.11,<3.14")
    assert new.status == "note" and ">=3.11,<3.14" in new.remark
    old, unknown = judge_python("3.10.13", ">=3.11"), judge_python("3.12.3", "")
    (problem,) = problems([old])
    assert problem.startswith("python 3.10.13 ") and problem.endswith(">=3.11")
    assert problems([unknown])[0].startswith("fp8lm is not installed")


def test_missing_packages():
    missing = package("megatron-core", None, ">=0.16.1,<0.20")
    (problem,) = problems(judge(machine(packages=(TORCH, missing))))
    assert problem.startswith("megatron-core ")
    assert problem.endswith('pip install "megatron-core>=0.16.1,<0.20"')
    optional = package("triton", None, required=False)
    assert problems(judge(machine(packages=(TORCH, MEGATRON, optional)))) == []
    assert remark(machine(packages=(optional,)), "triton").startswith("costs speed")


def test_the_bare_meta_package_is_named_once():
    broken = (
        TORCH,
        package("megatron-core", "0.16.1", error=META),
        package("transformer-engine", "2.20.2", required=False, error=META),
    )
    (problem,) = problems(judge(machine(packages=broken)))
    assert problem.startswith(f"transformer-engine cannot be imported ({META})")
    assert "because of transformer-engine" in remark(machine(packages=broken), "megatron-core")


def test_what_fails_for_want_of_another_package_is_not_a_problem_of_its_own():
    missing = package("torch", None, ">=2.11")
    megatron = package("megatron-core", error="ModuleNotFoundError: No module named 'torch'")
    (problem,) = problems(judge(machine(packages=(missing, megatron))))
    assert problem.endswith('pip install "torch>=2.11"')
    assert problems([judge_package(megatron, (TORCH, megatron))]) != []


def test_a_broken_triton_is_no_problem():
    triton = Package("triton", required=False, present=True, error="ImportError: undefined symbol")
    facts = machine(packages=(TORCH, triton))
    assert problems(judge(facts)) == []
    assert "undefined symbol), which costs speed" in remark(facts, "triton")


def test_an_empty_apex_is_a_problem():
    error = "ModuleNotFoundError: No module named 'apex.normalization'"
    apex = Package("apex", required=False, present=True, error=error)
    (problem,) = problems(judge(machine(packages=(TORCH, apex))))
    assert problem.startswith("apex is not NVIDIA's, or empty") and "uninstall" in problem
