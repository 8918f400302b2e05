"""The C interface (bindings/c/flash_entmax_c.h) for PyTorch tensors, by ctypes."""

import ctypes as C
import math

import torch

from c_structs import (ENGINES, STATUS, BufferArg, GradientsArg, OptionsArg, PlanArg, ProblemArg,
                       TensorArg)

DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, torch.uint8: 4,
          torch.int32: 5, torch.int64: 6}


class EngineError(RuntimeError):
    """`kind` names the StatusCode."""

    def __init__(self, code, message):
        super().__init__(message)
        self.kind = STATUS[code]


def tensor_arg(t):
    if t is None:
        return TensorArg()
    return TensorArg(t.data_ptr(), DTYPES[t.dtype], t.dim(), (C.c_int64 * 4)(*t.shape),
                     (C.c_int64 * 4)(*t.stride()))


def buffer_arg(t):
    return BufferArg(t.data_ptr(), t.numel()) if t is not None and t.numel() else BufferArg()


class Library:
    def __init__(self, path):
        self.c = C.CDLL(path)
        self.c.flash_entmax_last_error.restype = C.c_char_p

    def check(self, code):
        if code:
            raise EngineError(code, self.c.flash_entmax_last_error().decode())

    def device(self):
        text = C.create_string_buffer(256)
        self.check(self.c.flash_entmax_gpu_describe(text, C.c_int64(256)))
        return text.value.decode()


class Attention:
    """One problem with its buffers; forward() and backward() only launch.

    Buffers are filled with NaN patterns first, so that whatever is read before it is written shows.
    """

    def __init__(self, library, query, key, value, *, alpha=1.5, alpha_per_head=None, scale=None,
                 query_scale=None, causal=False, window=(-1, -1), key_lengths=None, slopes=None,
                 softcap=0.0, cu_query=None, cu_key=None, max_query=0, max_key=0, save=True,
                 alpha_gradient=False, slope_gradient=True, capacity=-1, engine="automatic", key_mask=None, bias=None,
                 output=None, visit_all=False):
        self.library = library
        self.query, self.key, self.value = query, key, value
        self.keep = (alpha_per_head, query_scale, key_lengths, slopes, cu_query, cu_key, key_mask,
                     bias)
        self.slopes, self.query_scale = slopes, query_scale
        self.wants_slope_gradient = slopes is not None and slope_gradient
        self.problem = ProblemArg(
            *[tensor_arg(t) for t in (query, key, value, alpha_per_head, query_scale, key_lengths,
                                      key_mask, bias, slopes, cu_query, cu_key)],
            alpha, math.nan if scale is None else scale, softcap, window[0], window[1], int(causal))
        self.options = OptionsArg(None, int(save), int(alpha_gradient), max_query, max_key,
                                  capacity, ENGINES[engine], int(visit_all))
        self.plan = PlanArg()
        library.check(library.c.flash_entmax_gpu_plan(C.byref(self.problem), C.byref(self.options),
                                                      C.byref(self.plan)))
        self.engine = [k for k, v in ENGINES.items() if v == self.plan.engine][0]
        self.saved, self.work, self.backward_work = [
            torch.full((n,), 0xFF, dtype=torch.uint8, device="cuda")
            for n in (self.plan.saved_bytes, self.plan.forward_bytes,
                      self.plan.backward_bytes if save else 0)]
        shape = (*query.shape[:3], value.shape[3])
        self.output = output if output is not None else torch.full(
            shape, math.nan, dtype=query.dtype, device="cuda")
        self.threshold = torch.full(query.shape[:3], -7.0, device="cuda")

    def use(self, query, key, value, output):
        """Other tensors of the same shapes, strides and types."""
        self.query, self.key, self.value, self.output = query, key, value, output
        self.problem.query = tensor_arg(query)
        self.problem.key = tensor_arg(key)
        self.problem.value = tensor_arg(value)

    def _stream(self):
        self.options.stream = torch.cuda.current_stream().cuda_stream

    def forward(self):
        self._stream()
        output, threshold = tensor_arg(self.output), tensor_arg(self.threshold)
        self.library.check(self.library.c.flash_entmax_gpu_forward(
            C.byref(self.problem), C.byref(self.options), C.byref(output), C.byref(threshold),
            buffer_arg(self.saved), buffer_arg(self.work)))
        return self.output

    def prepare_backward(self, output_gradient, gradients=None):
        heads = self.query.shape[1]
        make = lambda *shape: torch.full(shape, math.nan, device="cuda")
        self.output_gradient = output_gradient
        self.gradients = gradients or [torch.full_like(t, math.nan) for t in
                                       (self.query, self.key, self.value)]
        self.alpha_gradient = make(heads) if self.options.alpha_gradient else None
        self.slope_gradient = make(heads) if self.wants_slope_gradient else None
        self.scale_gradient = make(*self.query.shape[:3]) if self.query_scale is not None else None
        self.arg = GradientsArg(*[tensor_arg(t) for t in (
            output_gradient, *self.gradients, self.alpha_gradient, self.slope_gradient,
            self.scale_gradient)])

    def backward(self):
        self._stream()
        self.library.check(self.library.c.flash_entmax_gpu_backward(
            C.byref(self.problem), C.byref(self.options), C.byref(self.arg),
            buffer_arg(self.saved), buffer_arg(self.backward_work)))
        return self.gradients

    def support(self):
        """(row_offsets, key_index, probability) from the thresholds of forward()."""
        self._stream()
        c, rows = self.library.c, self.query.shape[:3].numel()
        size = C.c_int64()
        self.library.check(c.flash_entmax_gpu_support_workspace(C.byref(self.problem),
                                                                C.byref(size)))
        workspace = torch.full((size.value,), 0xFF, dtype=torch.uint8, device="cuda")
        offsets = torch.full((rows + 1,), -1, dtype=torch.int64, device="cuda")
        threshold, offsets_arg = tensor_arg(self.threshold), tensor_arg(offsets)
        self.library.check(c.flash_entmax_gpu_support_offsets(
            C.byref(self.problem), C.byref(self.options), C.byref(threshold), C.byref(offsets_arg),
            buffer_arg(workspace)))
        entries = int(offsets[-1])
        index = torch.full((entries,), -1, dtype=torch.int32, device="cuda")
        probability = torch.full((entries,), math.nan, device="cuda")
        if entries:
            index_arg, probability_arg = tensor_arg(index), tensor_arg(probability)
            self.library.check(c.flash_entmax_gpu_support_entries(
                C.byref(self.problem), C.byref(self.options), C.byref(threshold),
                C.byref(offsets_arg), C.byref(index_arg), C.byref(probability_arg)))
        return offsets, index, probability
