"""Fetch a model of the hub, before anything starts and once for all nodes. Run by the engine's own Python:

    python pd_model_download.py MODEL [REVISION]

It fetches what vLLM would (model_loader/default_loader.py): safetensors where there are some, else the other weights,
and every small file beside them. With all of it in the cache it asks the hub for the list of files, and is done.
"""

import shutil
import sys
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
NEVER = ("original/*", "*.h5", "*.msgpack", "*.onnx", "*.ot", "*.tflite", "coreml/*", "onnx/*", "openvino/*")
GIB = 2**30


def main() -> None:
    model, revision = sys.argv[1], (sys.argv[2] if len(sys.argv) > 2 else None)
    try:
        download(model, revision)
    except GatedRepoError:
        if is_cached(model, revision):
            return
        sys.exit(f"{model} is gated: accept its licence on the hub, and set HF_TOKEN")
    except RepositoryNotFoundError:
        sys.exit(f"the hub knows no model {model} (or a private one: set HF_TOKEN)")
    except Exception as exc:  # noqa: BLE001  of whatever HTTP client the hub's package uses
        reason = f"{type(exc).__name__}: {(str(exc).splitlines() or [''])[0]}"
        if not is_cached(model, revision):
            sys.exit(f"cannot fetch {model}: {reason}")
        print(f"the hub cannot be asked for {model}, which is in the cache: {reason}", flush=True)


def download(model: str, revision: str | None) -> None:
    files = HfApi().model_info(model, revision=revision, files_metadata=True).siblings or []
    sizes = {file.rfilename: file.size or 0 for file in files}
    unwanted = [*NEVER, *unused_weights(sizes)]
    wanted = {name: size for name, size in sizes.items() if not any(Path(name).match(pattern) for pattern in unwanted)}
    check_disk(sum(wanted.values()))
    print(f"{model}: {len(wanted)} files, {sum(wanted.values()) / GIB:.1f} GiB", flush=True)
    print(snapshot_download(model, revision=revision, ignore_patterns=unwanted), flush=True)


def is_cached(model: str, revision: str | None) -> bool:
    """As far as anybody knows without the hub: vLLM takes what is there, too."""
    try:
        snapshot_download(model, revision=revision, local_files_only=True)
    except Exception:  # noqa: BLE001  see above
        return False
    return True


def unused_weights(names: object) -> list[str]:
    """Patterns of the weights that vLLM passes over: it takes the first kind there is."""
    files = [str(name) for name in names]  # type: ignore[attr-defined]
    kinds = [kind for kind in WEIGHTS if any(name.endswith(kind) for name in files)]
    twice = ["consolidated*"] if any(name.startswith("model") and name.endswith(WEIGHTS[0]) for name in files) else []
    return [*(f"*{kind}" for kind in kinds[1:]), *twice]


def check_disk(size: int) -> None:
    """What is in the cache already does not count twice, but nobody knows how much of it that is: twice is enough."""
    cache = Path(constants.HF_HUB_CACHE)
    there = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    have = sum(file.stat().st_size for file in cache.glob("models--*/blobs/*") if file.is_file())
    if size > free + have:
        sys.exit(f"the model has {size / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free in {cache}: set HF_HOME")


if __name__ == "__main__":
    main()
