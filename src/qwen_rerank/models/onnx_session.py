"""A checked ONNX graph on ONNX Runtime: what may be loaded, how much memory a run may take, and what its failures mean."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnxruntime

from qwen_rerank.errors import DeviceOutOfMemoryError, ModelCorruptError, ModelError, ScorerError
from qwen_rerank.extras import memory_bytes
from qwen_rerank.models.names import first_line
from qwen_rerank.models.onnx_graph import TYPE_NAMES, ExternalTensor, Graph, Value, read_graph
from qwen_rerank.regular_files import open_regular
from qwen_rerank.sharing import ForkLock, renew_in_child

# Of one run, beside the weights: half of the memory of the machine or container.
WORKING_BYTES = (memory_bytes() or 8 * 1024**3) // 2
_INPUT_TYPES = {"int64": np.int64, "int32": np.int32}
_OUTPUT_TYPES = ("float32", "float16")
_NUMPY_TYPES = {1: "<f4", 2: "u1", 3: "i1", 4: "<u2", 5: "<i2", 6: "<i4", 7: "<i8", 9: "?", 10: "<f2", 11: "<f8"}
_NUMPY_TYPES |= {12: "<u4", 13: "<u8"}
_SAMPLE_BYTES = 4096
# What lies in the processor's cache: encoders 384 wide took 20 % less of its time at 512 tokens than at 4,096.
_TOKENS_A_THREAD = 256
# Where each row is a run of its own: enough rows that no thread waits long for the others at the end of a batch.
_TOKENS_A_THREAD_BY_ROW = 2048
_SILENT = 4  # fatal alone: what goes wrong is raised, and said once
_MARKS = re.compile(r"\[ONNXRuntimeError\] : \d+ : \w+ : ")
_registering = ForkLock()


class OnnxSession:
    """Runs one graph whose inputs are token ids, mask and segments, `(n_rows, n_tokens)`, on the CPU.

    Memory is bounded: nothing is computed while loading, and a run may allocate at most `WORKING_BYTES`, whatever sizes
    the graph asks for, and gives it back. A forked process, where the runtime's threads are gone, opens the graph again.

    A graph that rounds a whole batch by its largest value would let one text's result depend on another's. Each row is
    then a run of its own, without padding, and the threads take a row each.

    Args:
        graph: As `read_graph` gave it.
        output: Name of the output to read; None where there is one, or where one of `logits` and `last_hidden_state` is.
        rank: How many dimensions the output may have.
        threads: Threads that compute at once; None for one a core.
        fold: Whether what is constant may be computed while loading, where memory has no bound: for our own graphs alone.

    Attributes:
        inputs: Names of what the graph takes.
        tokens_at_once: How many tokens a batch should have at most, unless it is one row: what is fast.
        digest: 64 hex digits over graph and weights.

    Raises:
        ModelError: If inputs or outputs are not what such a model has, or the runtime refuses the graph.
    """

    def __init__(
        self, graph: Graph, *, output: str | None, rank: tuple[int, ...], threads: int | None = None, fold: bool = False
    ) -> None:
        self._path = graph.path
        self._threads = threads or _usable_cores()
        self._by_row = graph.rounds_by_batch
        self._settings = (1 if self._by_row else threads, fold)
        self.tokens_at_once = max(2, self._threads) * (_TOKENS_A_THREAD_BY_ROW if self._by_row else _TOKENS_A_THREAD)
        self._dtypes = {value.name: _INPUT_TYPES[_check_input(graph, value)] for value in graph.inputs.values()}
        self.inputs = frozenset(self._dtypes)
        if "input_ids" not in self.inputs:
            raise ModelError(f"{graph.path} takes {_names(graph.inputs)} and no input_ids; give an encoder's graph.")
        self._output = _check_output(graph, output, rank)
        self._options = onnxruntime.RunOptions()
        self._options.log_severity_level = _SILENT
        # Memory is given back after each run, or that of the longest batch would be kept for ever: 1.4 GB after
        # 32 x 512 tokens in a small encoder. It costs nothing that could be measured.
        self._options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        with ThreadPoolExecutor(1) as beside:  # the weights are read once more while the runtime opens them
            digest = beside.submit(graph_digest, graph)
            self._start(graph)
        self.digest = digest.result()
        renew_in_child(self)

    def renew(self) -> None:
        """Keep the parent's session for as long as this forked process lives.

        Its threads are not here, and to end it would be to wait for them for ever.
        """
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._session))

    def _start(self, graph: Graph) -> None:
        self._session = _open(graph, *self._settings)
        self._pool = ThreadPoolExecutor(self._threads, "qwen-rerank-onnx")
        self._pid = os.getpid()

    def run(self, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the output for a batch, as float32; zeros stand behind the end of a row that is run by itself.

        Args:
            feeds: The inputs, `(n_rows, n_tokens)`, padded on the right; `attention_mask` even where the graph takes none.

        Raises:
            DeviceOutOfMemoryError: If the batch needs more memory than a run may take.
            ScorerError: If the graph cannot be run on it.
            ModelError: In a forked process, if the file is not what it was.
        """
        if os.getpid() != self._pid:
            self._open_again()
        given = {name: feeds[name].astype(dtype, copy=False) for name, dtype in self._dtypes.items()}
        if not self._by_row:
            return self._run(given)
        lengths = feeds["attention_mask"].sum(axis=1)
        rows = [{name: a[i : i + 1, :n] for name, a in given.items()} for i, n in enumerate(lengths)]
        return _stacked(list(self._pool.map(self._run, rows)))

    def _run(self, given: Mapping[str, np.ndarray]) -> np.ndarray:
        try:
            [found] = self._session.run([self._output], given, self._options)
        except Exception as exc:  # the runtime's errors have no common base
            if "alloc" in str(exc).lower() or "Available memory" in str(exc):
                shape = given["input_ids"].shape
                raise DeviceOutOfMemoryError(
                    f"{self._path} needs more than {WORKING_BYTES / 1024**3:.1f} GiB for {shape[0]} x {shape[1]} tokens; "
                    "lower batch_size or max_length."
                ) from exc
            raise ScorerError(f"{self._path} cannot be run ({_reason(exc)}).") from exc
        return np.asarray(found, dtype=np.float32)

    def _open_again(self) -> None:
        graph = read_graph(self._path)
        if graph_digest(graph) != self.digest:
            raise ModelCorruptError(f"{self._path} has changed since process {self._pid} opened it; start anew.")
        self._start(graph)


def graph_digest(graph: Graph) -> str:
    """Return 64 hex digits over a graph and its weights; of weights beside it their first and last 4 KiB count."""
    digest = hashlib.sha256(graph.data)
    for tensor in graph.external:
        digest.update(f"{tensor.name}\0{tensor.dtype}\0{tensor.shape}".encode())
        with open_regular(tensor.path) as file:
            for place in (0, max(0, tensor.n_bytes - _SAMPLE_BYTES)):
                file.seek(tensor.offset + place)
                digest.update(file.read(min(_SAMPLE_BYTES, tensor.n_bytes - place)))
    return digest.hexdigest()


def _check_input(graph: Graph, value: Value) -> str:
    """Return the name of an input's data type."""
    dtype = TYPE_NAMES.get(value.dtype, str(value.dtype))
    if value.name not in ("input_ids", "attention_mask", "token_type_ids"):
        raise ModelError(
            f"{graph.path} takes {value.name!r:.80}, which is neither input_ids, attention_mask nor token_type_ids; "
            "give an encoder's graph."
        )
    if dtype not in _INPUT_TYPES or value.shape is None or len(value.shape) != 2:
        raise ModelError(f"{graph.path} takes {value.name} as {_said(value)}; it must be int64 (rows, tokens).")
    if any(isinstance(size, int) for size in value.shape):
        raise ModelError(f"{graph.path} takes {value.name} only as {_said(value)}; export it with both sizes open.")
    return dtype


def _check_output(graph: Graph, name: str | None, rank: tuple[int, ...]) -> str:
    """Return the name of the output to read."""
    usual = [each for each in ("logits", "last_hidden_state") if each in graph.outputs]
    name = name or (usual[0] if usual else next(iter(graph.outputs), None) if len(graph.outputs) == 1 else None)
    value = graph.outputs.get(name or "")
    if value is None:
        raise ModelError(f"{graph.path} gives {_names(graph.outputs)} and not {name or 'one output'}.")
    dtype = TYPE_NAMES.get(value.dtype, str(value.dtype))
    if dtype not in _OUTPUT_TYPES or (value.shape is not None and len(value.shape) not in rank):
        raise ModelError(
            f"{graph.path} gives {value.name!r:.80} as {_said(value)}; expected float32 with "
            f"{' or '.join(map(str, rank))} dimensions."
        )
    return value.name


def _open(graph: Graph, threads: int | None, fold: bool) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _SILENT
    options.enable_mem_pattern = False  # of no use where every batch has another length
    if threads is not None:
        options.intra_op_num_threads = threads
    options.add_session_config_entry("session.use_env_allocators", "1")
    if fold:
        options.add_session_config_entry("session.disable_quant_qdq", "1")  # stored in four bits, computed in eight
    else:  # folding runs parts of the graph outside of the arena
        options.add_session_config_entry("optimization.disable_specified_optimizers", "ConstantFolding")
    values = [_external_value(tensor) for tensor in graph.external]
    if values:
        options.add_external_initializers([tensor.name for tensor in graph.external], values)
    # The runtime's arena is the one place that can be given a limit, for all sessions that are made while it is
    # registered; so each session gets one of its own. Weights lie in it twice where they are packed for the processor.
    info = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    limit = {"max_mem": WORKING_BYTES + 2 * graph.n_bytes, "arena_extend_strategy": 1}  # 1: no more than was asked for
    try:
        with _registering:
            onnxruntime.create_and_register_allocator(info, onnxruntime.OrtArenaCfg(limit))
            session = onnxruntime.InferenceSession(
                graph.data, options, providers=["CPUExecutionProvider"], read_config_from_model=0
            )
    except Exception as exc:  # as above
        raise ModelCorruptError(f"{graph.path} cannot be loaded ({_reason(exc)}); download it again.") from exc
    session._model_bytes = None  # kept for a second try; it would hold all weights twice
    return session


def _usable_cores() -> int:
    """Return how many cores this process may use, where the system says; else how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _stacked(rows: list[np.ndarray]) -> np.ndarray:
    """Return the outputs of single rows as that of one batch, with zeros behind the shorter ones."""
    out = np.zeros((len(rows), *max(row.shape[1:] for row in rows)), dtype=np.float32)
    for i, row in enumerate(rows):
        place: tuple[int | slice, ...] = (i, *(slice(size) for size in row.shape[1:]))
        out[place] = row[0]
    return out


def _external_value(tensor: ExternalTensor) -> Any:
    """Return a weight that lies beside the graph, mapped into memory, so that the runtime opens no file itself."""
    if tensor.dtype not in _NUMPY_TYPES:
        raise ModelError(f"{tensor.path} holds {tensor.name!r:.80} in a data type that only fits inside a graph.")
    dtype = _NUMPY_TYPES[tensor.dtype]
    if not tensor.n_bytes:  # an empty range cannot be mapped
        return onnxruntime.OrtValue.ortvalue_from_numpy(np.empty(tensor.shape, dtype))
    mapped = np.memmap(tensor.path, mode="r", dtype=np.uint8, offset=tensor.offset, shape=(tensor.n_bytes,))
    return onnxruntime.OrtValue.ortvalue_from_numpy(mapped.view(dtype).reshape(tensor.shape))


def _reason(exc: Exception) -> str:
    """Return the beginning of what the runtime says, without its marks."""
    return _MARKS.sub("", first_line(exc))[:200]


def _said(value: Value) -> str:
    shape = "any shape" if value.shape is None else f"({', '.join(str(size or '?') for size in value.shape)})"
    return f"{TYPE_NAMES.get(value.dtype, value.dtype)} {shape:.80}"


def _names(values: Mapping[str, Value]) -> str:
    return f"{', '.join(values) or 'nothing':.200}"
