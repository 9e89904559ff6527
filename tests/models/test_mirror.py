"""A mirror of the model hub, as people behind a wall use one: HF_ENDPOINT is all that is set."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

from tests.scorers.http.stub import Reply, serving

NAME, COMMIT = "someone/reranker", "0" * 40
FILES = {"config.json": b'{"model_type": "qwen3"}', "tokenizer.json": b"{}", "model.safetensors": b"weights"}


def mirror(request):
    """Answer as the hub does: what is in a repository, and its files."""
    if request.path.startswith(f"/api/models/{NAME}/tree/"):
        return [{"type": "file", "path": name, "size": len(text), "oid": COMMIT} for name, text in FILES.items()]
    if request.path.startswith(f"/api/models/{NAME}"):
        return {"id": NAME, "modelId": NAME, "sha": COMMIT, "siblings": [{"rfilename": name} for name in FILES]}
    name = request.path.removeprefix(f"/{NAME}/resolve/{COMMIT}/")
    if name not in FILES:
        return Reply(404, {"error": "no such file"})
    etag = hashlib.sha256(FILES[name]).hexdigest()
    return Reply(200, body=FILES[name], headers={"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})


def test_a_model_comes_from_the_mirror_and_the_second_time_from_the_cache(tmp_path):
    code = f"from qwen_rerank.models.names import find_model; print(find_model({NAME!r}).path)"

    def find(**env):
        command = [sys.executable, "-c", code]
        env = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1", **env}
        return subprocess.run(command, capture_output=True, text=True, env=env)

    with serving(mirror) as server:
        found = find(HF_ENDPOINT=server.url)
    again = find(HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="1")

    assert found.returncode == 0, found.stderr
    assert again.stdout == found.stdout
