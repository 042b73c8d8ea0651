"""Tokenizes with llama.cpp's own library, through ctypes.

The library is the one of the npm package @node-llama-cpp/linux-x64, version 3.22.1 (llama.cpp v0.5.0):
    npm pack @node-llama-cpp/linux-x64@3.22.1 && tar xzf node-llama-cpp-linux-x64-3.22.1.tgz
    export LLAMA_LIB_DIR=$PWD/package/bins/linux-x64
"""

import ctypes
import os
import pathlib


class ModelParams(ctypes.Structure):
    """struct llama_model_params of llama.h at that version."""

    _fields_ = [
        ("devices", ctypes.c_void_p),
        ("tensor_buft_overrides", ctypes.c_void_p),
        ("n_gpu_layers", ctypes.c_int32),
        ("split_mode", ctypes.c_int),
        ("load_mode", ctypes.c_int),
        ("lazy_mode", ctypes.c_int),
        ("main_gpu", ctypes.c_int32),
        ("tensor_split", ctypes.c_void_p),
        ("progress_callback", ctypes.c_void_p),
        ("progress_callback_user_data", ctypes.c_void_p),
        ("kv_overrides", ctypes.c_void_p),
        ("vocab_only", ctypes.c_bool),
        ("check_tensors", ctypes.c_bool),
        ("use_extra_bufts", ctypes.c_bool),
        ("no_host", ctypes.c_bool),
        ("no_alloc", ctypes.c_bool),
        ("load_mtp", ctypes.c_bool),
    ]


def _library():
    folder = pathlib.Path(os.environ["LLAMA_LIB_DIR"])
    for name in ["libggml-base", "libggml", "libllama"]:
        path = sorted(folder.glob(f"{name}.*so*"))[0]
        lib = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    lib.llama_model_default_params.restype = ModelParams
    lib.llama_model_load_from_file.argtypes = [ctypes.c_char_p, ModelParams]
    lib.llama_model_load_from_file.restype = ctypes.c_void_p
    lib.llama_model_get_vocab.argtypes = [ctypes.c_void_p]
    lib.llama_model_get_vocab.restype = ctypes.c_void_p
    lib.llama_vocab_n_tokens.argtypes = [ctypes.c_void_p]
    lib.llama_tokenize.argtypes = [
        ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool, ctypes.c_bool,
    ]
    lib.llama_token_to_piece.argtypes = [
        ctypes.c_void_p, ctypes.c_int32, ctypes.c_char_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_bool,
    ]
    return lib


class Vocab:
    """The vocabulary of one GGUF file."""

    def __init__(self, path):
        self.lib = _library()
        silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
        self.silent = silent
        self.lib.llama_log_set(silent, None)
        params = self.lib.llama_model_default_params()
        params.vocab_only = True
        model = self.lib.llama_model_load_from_file(str(path).encode(), params)
        if not model:
            raise ValueError(f"llama.cpp does not load {path}")
        self.vocab = self.lib.llama_model_get_vocab(model)
        self.size = self.lib.llama_vocab_n_tokens(self.vocab)

    def encode(self, text, add_special=False):
        data = text.encode()
        room = len(data) + 16
        ids = (ctypes.c_int32 * room)()
        count = self.lib.llama_tokenize(self.vocab, data, len(data), ids, room, add_special, True)
        if count < 0:
            raise ValueError(f"{-count} tokens do not fit")
        return list(ids[:count])

    def piece(self, token, special=True):
        """The bytes of one token."""
        room = 1024
        buffer = ctypes.create_string_buffer(room)
        count = self.lib.llama_token_to_piece(self.vocab, token, buffer, room, 0, special)
        if count < 0:
            raise ValueError(f"the piece of token {token} is longer than {room} bytes")
        return buffer.raw[:count]
