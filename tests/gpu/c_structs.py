"""The structs of bindings/c/flash_entmax_c.h, and names of its numbers. Needs no PyTorch."""

import ctypes as C

ENGINES = {"automatic": 0, "screening": 1, "tiles": 2, "general": 3}
STATUS = {1: "InvalidArgument", 2: "Unimplemented", 3: "OutOfMemory", 4: "Io", 5: "Device"}


class TensorArg(C.Structure):
    _fields_ = [("data", C.c_void_p), ("dtype", C.c_int32), ("rank", C.c_int32),
                ("shape", C.c_int64 * 4), ("strides", C.c_int64 * 4)]


class ProblemArg(C.Structure):
    _fields_ = ([(x, TensorArg) for x in
                 ("query", "key", "value", "alpha_per_head", "query_scale", "key_lengths",
                  "key_mask", "bias", "alibi_slopes", "cu_query", "cu_key")]
                + [(x, C.c_double) for x in ("alpha", "scale", "softcap")]
                + [("window_left", C.c_int64), ("window_right", C.c_int64), ("causal", C.c_int32)])


class OptionsArg(C.Structure):
    _fields_ = [("stream", C.c_void_p), ("save_for_backward", C.c_int32),
                ("alpha_gradient", C.c_int32), ("max_query_length", C.c_int64),
                ("max_key_length", C.c_int64), ("support_capacity", C.c_int64),
                ("engine", C.c_int32), ("visit_all_tiles", C.c_int32)]


class PlanArg(C.Structure):
    _fields_ = [("engine", C.c_int32)] + [(x, C.c_int64) for x in
                                          ("saved_bytes", "forward_bytes", "backward_bytes",
                                           "support_capacity")]


class BufferArg(C.Structure):
    _fields_ = [("data", C.c_void_p), ("bytes", C.c_int64)]


class GradientsArg(C.Structure):
    _fields_ = [(x, TensorArg) for x in
                ("output", "query", "key", "value", "alpha", "alibi_slopes", "query_scale")]
