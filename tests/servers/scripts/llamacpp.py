"""Runs llama.cpp's server in the process of its Python package: `python llamacpp.py FILE PORT`."""

import sys
import threading

import xllamacpp

params = xllamacpp.CommonParams()
params.model.path, params.port = sys.argv[1], int(sys.argv[2])
params.hostnames = ["127.0.0.1"]
params.embedding, params.pooling_type = True, 4  # LLAMA_POOLING_TYPE_RANK, which is what --reranking sets
params.n_ctx, params.n_parallel, params.n_batch, params.n_ubatch = 8192, 2, 4096, 4096
params.cpuparams.n_threads = 2
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
threading.Event().wait()
