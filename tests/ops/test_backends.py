"""Which implementation runs, and what is said about it (R1, R14)."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import lmn_kernels
from lmn_kernels import (
    BackendError,
    LinearMerge,
    LogarithmicMemory,
    LogarithmicMixing,
    LookAheadMemoryAttention,
    Sequences,
)
from lmn_kernels.backend import choice, extension

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
CUDA = torch.device("cuda")  # only a name: none of these tests touches a device


@pytest.fixture(autouse=True)
def _as_in_a_new_process(monkeypatch):
    """No variable of the machine's own, no warning used up by an earlier test, and nothing settled by one."""
    monkeypatch.delenv("LMN_KERNELS_BACKEND", raising=False)
    monkeypatch.setattr(choice, "_warned", set())
    monkeypatch.setattr(choice, "_chosen", {})


@pytest.fixture
def built() -> None:
    if (reason := extension.load()[1]) is not None:
        pytest.skip(reason)


@pytest.fixture
def no_extension(monkeypatch) -> str:
    reason = "the extension is not built on this machine"
    monkeypatch.setattr(extension, "load", lambda: ({}, reason))
    return reason


def refusal(backend: str, operation: str, device: torch.device = CPU) -> str:
    """The message with which a backend that was asked for by name refuses; the test is skipped where it serves."""
    try:
        choice.resolve(backend, operation, device)
    except BackendError as error:
        return str(error)
    pytest.skip(f"{backend} serves {operation} on {device.type} here")


@pytest.mark.ext
def test_auto_on_the_cpu_is_silent_and_is_the_extension_in_both_forms(built):
    x = torch.randn(2, 21, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = LogarithmicMixing(8, 2, 2)
        y = layer(x)
        _, state = layer.prefill(x)
        layer.step(x[:, :1], state)
    assert torch.equal(y, _named(layer, "cpp")(x))
    torch.testing.assert_close(y, _named(layer, "reference")(x))
    for operation in ("build_tree", "attend", "step"):
        assert choice.resolve("auto", operation, CPU) == "cpp"


def both_forms(dtype: torch.dtype = torch.float32, **options: object) -> list[str]:
    """The warnings of a layer whose parallel and sequential forms are run without gradients, and agree."""
    layer, x = LogarithmicMemory(8, 2, 2, dtype=dtype, **options), torch.randn(2, 6, 8, dtype=dtype)
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        expected, state, pool = layer(x), layer.init_state(2), layer.init_state(2, max_position=6)
        for t in range(6):
            y, state = layer.step(x[:, t : t + 1], state)
            torch.testing.assert_close(y, expected[:, t : t + 1])
            torch.testing.assert_close(layer.step_(x[:, t : t + 1], pool), y)
    return [str(warning.message) for warning in caught]


@pytest.mark.ext
def test_the_extension_steps_on_the_cpu_in_silence(built):
    assert choice.resolve("auto", "step", CPU) == choice.resolve("cpp", "step", CPU) == "cpp"
    assert both_forms() == both_forms(step_backend="cpp") == []


def test_without_the_extension_each_operation_says_so_and_once(no_extension):
    said = "lmn_kernels: {} on cpu runs on the PyTorch reference: {}"
    assert both_forms() == [said.format(name, no_extension) for name in ("build_tree", "attend", "step")]
    assert both_forms() == []


def test_the_reference_by_name_is_silent(no_extension):
    assert both_forms(backend="reference") == both_forms(backend="reference", step_backend="reference") == []


def test_no_kernel_is_missed_in_float64(no_extension):
    assert both_forms(torch.float64) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for operation in choice.OPERATIONS:
            for device in (CPU, CUDA):
                assert choice.resolve("auto", operation, device, torch.float64) == "reference"
                with pytest.raises(BackendError, match="float64"):
                    choice.resolve(choice.preferred(operation, CUDA), operation, CUDA, torch.float64)


@pytest.mark.parametrize("kind", [LogarithmicMixing, LogarithmicMemory])
def test_the_sequential_form_has_a_backend_of_its_own(kind, no_extension):
    """Which follows the parallel one's to the reference, and nowhere else."""
    for backend, expected in (("auto", "auto"), ("triton", "auto"), ("reference", "reference")):
        assert kind(8, backend=backend).step_backend == expected
        assert kind(8, backend=backend, step_backend="cpp").step_backend == "cpp"
    with pytest.raises(ValueError, match="step_backend: expected one of auto, reference, cpp, got 'gpp'"):
        kind(8, step_backend="gpp")
    x, layer = torch.randn(1, 1, 8), kind(8, step_backend="cpp")
    y = layer(x)
    with torch.no_grad(), pytest.raises(BackendError, match=f"'cpp' cannot serve step on cpu: {no_extension}"):
        layer.step(x, layer.init_state(1))
    with pytest.raises(BackendError, match="'cpp' cannot serve step on cpu"):
        layer.step_(x, layer.init_state(1, max_position=1))
    with pytest.raises(BackendError, match="'cpp' cannot serve step on cpu: gradients are recorded"):
        layer.step(x, layer.init_state(1))
    layer.step_backend = "reference"
    torch.testing.assert_close(layer.step(x, layer.init_state(1))[0], y)


@pytest.mark.parametrize("operation", choice.OPERATIONS)
@pytest.mark.parametrize("backend", ["triton", "cpp"])
@pytest.mark.parametrize("device", ["cpu", "mps", "meta"])
def test_a_forced_backend_that_cannot_serve_says_which_what_where_and_why(backend, operation, device):
    message = refusal(backend, operation, torch.device(device))
    head, reason = message.split(": ", 1)
    for part in (backend, operation, device):
        assert part in head
    assert len(reason.split()) > 3, "a reason is a sentence, not a code"
    assert not issubclass(BackendError, NotImplementedError)


@pytest.mark.parametrize("backend", ["triton", "cpp"])
@pytest.mark.usefixtures("no_extension")
def test_a_forced_backend_is_never_replaced_in_silence(backend):
    """Layer, block and operations raise alike; the layer was made without a complaint, as its device may change."""
    for operation in ("build_tree", "attend"):
        refusal(backend, operation)
    x = torch.randn(1, 9, 8)
    for kind in (LogarithmicMixing, LogarithmicMemory):
        layer = kind(8, 2, 2, backend=backend)
        with pytest.raises(BackendError, match=backend):
            layer(x)
        with pytest.raises(BackendError, match=backend):
            layer.prefill(x)
    sequences = Sequences.equal(1, 9)
    merge = LinearMerge(torch.randn(2, 1, 16, 8), torch.randn(2, 8), None)
    with pytest.raises(BackendError, match="build_tree"):
        lmn_kernels.build_tree(x[0], merge, sequences, backend=backend)
    nodes = lmn_kernels.build_tree(x[0], merge, sequences)
    with pytest.raises(BackendError, match="attend"):
        lmn_kernels.attend(torch.randn(9, 24), torch.cat([nodes, nodes], -1), 2, sequences, backend=backend)


def test_a_callable_summarizer_cannot_be_forced_off_the_reference():
    layer = LogarithmicMixing(8, 2, 1, summarizer=lambda left, right: left - right, backend="triton")
    with pytest.raises(BackendError, match="callable summarizer"):
        layer(torch.randn(1, 9, 8))


@pytest.mark.parametrize("name", ["cuda", "Reference", "", "pytorch", None])
def test_no_backend_of_that_name(name):
    with pytest.raises(ValueError, match="^backend: expected one of auto, reference, triton, cpp, got"):
        LogarithmicMixing(8, backend=name)
    with pytest.raises(ValueError, match="^backend: expected one of auto, reference, triton, got"):
        LookAheadMemoryAttention(8, 2, backend=name)
    with pytest.raises(ValueError, match="backend: expected one of auto, reference, triton, cpp, got"):
        choice.resolve(name, "attend", CPU)


def test_the_variable_says_what_auto_means(monkeypatch):
    message = refusal("triton", "build_tree")
    layer = LogarithmicMixing(8, 2)
    x = torch.randn(1, 9, 8)
    expected, reference = layer(x), _named(layer, "reference")(x)
    monkeypatch.setenv("LMN_KERNELS_BACKEND", "triton")
    with pytest.raises(BackendError, match="triton") as raised:
        layer(x)
    assert str(raised.value) == message
    assert torch.equal(_named(layer, "reference")(x), reference), "a name beats the variable"
    for value in ("auto", ""):
        monkeypatch.setenv("LMN_KERNELS_BACKEND", value)
        assert torch.equal(layer(x), expected)
    monkeypatch.setenv("LMN_KERNELS_BACKEND", "reference")
    assert torch.equal(layer(x), reference)


def _named(layer: LogarithmicMixing, backend: str) -> LogarithmicMixing:
    named = LogarithmicMixing(layer.embedding, layer.heads, layer.bank, backend=backend)
    named.load_state_dict(layer.state_dict())
    return named


def test_the_variable_chooses_the_reference_where_kernels_would_be(monkeypatch):
    monkeypatch.setattr(choice, "why_not", lambda backend, operation, *_: None)
    monkeypatch.setattr(choice, "UNPROVEN", {})
    assert choice.resolve("auto", "attend", CUDA) != "reference"
    monkeypatch.setenv("LMN_KERNELS_BACKEND", "reference")
    assert choice.resolve("auto", "attend", CUDA) == "reference"


def test_the_variable_leaves_what_its_backend_does_not_have_to_auto(monkeypatch):
    """One variable for all operations: naming the kernels of the tree must not forbid a step."""
    monkeypatch.setattr(choice, "why_not", lambda backend, operation, *_: None)
    monkeypatch.setattr(choice, "UNPROVEN", {})
    monkeypatch.setenv("LMN_KERNELS_BACKEND", "triton")
    assert choice.resolve("auto", "attend", CUDA) == "triton"
    assert choice.resolve("auto", "step", CUDA) == "cpp"
    monkeypatch.setenv("LMN_KERNELS_BACKEND", "cpp")
    assert choice.resolve("auto", "look_ahead_attend", CPU) == "reference"
    assert choice.resolve("auto", "attend", CPU) == choice.resolve("auto", "step", CPU) == "cpp"


def test_a_variable_with_a_typo_is_an_error(monkeypatch):
    monkeypatch.setenv("LMN_KERNELS_BACKEND", "trition")
    with pytest.raises(ValueError, match="trition"):
        LogarithmicMixing(8)(torch.randn(1, 4, 8))


def test_the_error_of_a_mistyped_variable_names_the_variable(monkeypatch):
    """Who set it may be far from who reads the message: "backend: …" points at an argument that nobody gave."""
    monkeypatch.setenv("LMN_KERNELS_BACKEND", "trition")
    with pytest.raises(ValueError, match="LMN_KERNELS_BACKEND"):
        choice.resolve("auto", "attend", CPU)


@pytest.mark.parametrize("operation", choice.OPERATIONS)
def test_auto_falls_back_with_one_warning_that_names_the_reason(monkeypatch, operation):
    monkeypatch.setattr(choice, "why_not", lambda backend, op, *_: f"no {backend} for {op} today")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert choice.resolve("auto", operation, CUDA) == "reference"
            assert choice.resolve("auto", operation, torch.device("cuda", 1)) == "reference"
    assert [w.category for w in caught] == [RuntimeWarning]
    text = str(caught[0].message)
    for part in (operation, "cuda", f"for {operation} today"):
        assert part in text


@pytest.mark.parametrize("operation, backend", [("attend", "triton"), ("step", "cpp")])
def test_what_no_gpu_has_run_serves_by_name_alone(monkeypatch, operation, backend):
    monkeypatch.setattr(choice, "why_not", lambda *_: None)
    with pytest.warns(RuntimeWarning, match=f"not run on a GPU yet;.*backend.*'{backend}'"):
        assert choice.resolve("auto", operation, CUDA) == "reference"
    assert choice.resolve(backend, operation, CUDA) == backend


def test_what_is_unproven_on_one_device_is_not_on_another(monkeypatch):
    monkeypatch.setattr(choice, "why_not", lambda *_: None)
    assert all(backend in choice.BACKENDS and kind == "cuda" for backend, kind in choice.UNPROVEN)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choice.resolve("auto", "step", CPU) == "cpp"


def test_another_reason_is_another_warning(monkeypatch):
    """Falling back for float64 must not silence the news that float32 falls back, too."""
    reasons = iter(["float64 is not served", "float64 is not served", "there is no device"])
    monkeypatch.setattr(choice, "why_not", lambda *_: next(reasons))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            choice.resolve("auto", "attend", CUDA)
    assert [str(w.message).endswith(("served", "device")) for w in caught] == [True, True]


@pytest.mark.parametrize("operation", choice.OPERATIONS)
def test_without_a_gpu_cuda_falls_back(operation):
    """The real reason, not a made-up one: whatever this build or this machine lacks."""
    reason = refusal(choice.preferred(operation, CUDA), operation, CUDA).split(": ", 1)[1]
    with pytest.warns(RuntimeWarning) as caught:
        assert choice.resolve("auto", operation, CUDA) == "reference"
    assert len(caught) == 1 and reason in str(caught[0].message)


def resolved_while_tracing(operation: str, device: torch.device) -> int:
    """How long the name is of the backend that a traced function finds."""
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="eager")
    def traced(x):
        return x + len(choice.resolve("auto", operation, device))

    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        return int(traced(torch.zeros(1)))


def test_falling_back_while_tracing_breaks_no_graph(no_extension):
    """A warning in the middle of a traced function would be a graph break."""
    refusal(choice.preferred("attend", CUDA), "attend", CUDA)
    for operation, device in (("attend", CUDA), ("step", CUDA), ("step", CPU)):
        assert resolved_while_tracing(operation, device) == len("reference")


@pytest.mark.ext
def test_the_extension_is_found_while_tracing(built):
    assert resolved_while_tracing("step", CPU) == len("cpp")


def run_info(**env: str) -> str:
    command = [sys.executable, "-W", "error", "-m", "lmn_kernels.info"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_info_is_the_same_from_the_command_line_and_from_a_call():
    text = lmn_kernels.info()
    # Threads are the one line that the two processes do not share.
    threads = str(torch.get_num_threads())
    assert run_info(OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads).strip() == text
    assert lmn_kernels.__version__ in text and torch.__version__ in text
    assert any(line.startswith("cpu:") for line in text.splitlines())
    for operation in choice.OPERATIONS:
        lines = [line for line in text.splitlines() if line.strip().startswith(f"{operation}:")]
        assert lines, f"{operation} is not in\n{text}"
        assert all(any(name in line for name in choice.BACKENDS[1:]) for line in lines)


def cpu_lines(text: str) -> dict[str, str]:
    """What `info` says about each operation on the CPU."""
    lines = text[text.index("cpu:") :].splitlines()[1 : 1 + len(choice.OPERATIONS)]
    return dict(line.strip().split(": ", 1) for line in lines)


@pytest.mark.filterwarnings("ignore:lmn_kernels. .* on cpu runs on")  # where the extension is not built
def test_info_tells_what_resolve_does(monkeypatch):
    for value in ("", "reference"):
        monkeypatch.setenv("LMN_KERNELS_BACKEND", value)
        for operation, says in cpu_lines(lmn_kernels.info()).items():
            assert says.split()[0] == choice.resolve("auto", operation, CPU)


def test_info_tells_that_the_variable_asks_for_what_cannot_be(monkeypatch):
    reason = refusal("triton", "build_tree").split(": ", 1)[1]
    monkeypatch.setenv("LMN_KERNELS_BACKEND", "triton")
    assert reason in cpu_lines(lmn_kernels.info())["build_tree"]


@pytest.mark.parametrize("value", ["triton", "trition"])
def test_info_survives_the_variable_that_one_runs_it_to_find(monkeypatch, value):
    monkeypatch.setenv("LMN_KERNELS_BACKEND", value)
    assert f"LMN_KERNELS_BACKEND={value}" in lmn_kernels.info()


@pytest.mark.parametrize("named_by", ["argument", "variable"])
def test_a_named_backend_is_never_passed_over_for_a_short_expander_or_a_callable(monkeypatch, named_by):
    """Below E tokens the expander is not folded, and a callable never is: both run without an operation."""
    backend = "triton" if named_by == "argument" else "auto"
    if named_by == "variable":
        monkeypatch.setenv("LMN_KERNELS_BACKEND", "triton")
    for options in ({"expand": 1}, {"summarizer": lambda left, right: left - right}):
        layer = LogarithmicMixing(8, backend=backend, **options)
        monkeypatch.setattr(
            lmn_kernels.layers.parallel, "attend", lambda *_, **__: pytest.fail("the reference built the tree")
        )
        with pytest.raises(BackendError, match="triton.*build_tree"):
            layer(torch.randn(1, 4, 8))
