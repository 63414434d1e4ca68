"""Families of failures: what explains a line that no entry of the catalogue knows.

Numbers and names that a library gives all its failures (CUDA, NCCL, errno, exit codes, ibverbs), classes of exceptions,
and what is missing on a machine. Each says less than an entry would, and is true of all its kind. The words are in
`families.json`: cudaError_t, ncclResult_t, errno, ibv_wc_status, signals of Linux; what is missing; other phrases.
"""

import errno
import json
import re
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from typing import Any, Final

from .meaning import Kind, Meaning

_CUDA_NUMBER = re.compile(
    r"(?:CUDA|cuda|driver|cudaGetDeviceCount)\w*\W.*?\b[Ee]rror:? (?:code:? )?(?P<number>\d{1,3})\b"
)
_CUDA_CONTEXT = re.compile(r"CUDA|cuda|nvrtc|driver|GPU")
_IBVERBS_CONTEXT = re.compile(r"(?i)rdma|ibv|completion|\bWC\b|\bQP\b|worker_pool|endpoint")
_PATH = re.compile(r"['\"(](?P<quoted>/[^'\"()]+)['\")]|(?<![\w/])(?P<bare>/(?:[\w.+-]+/)*[\w.+-]+)")
_ERRNO_FORMS = (
    re.compile(r"\[(?:Errno|WinError) (?P<n>\d{1,3})\]"),
    re.compile(r"\(os error (?P<n>\d{1,3})\)"),
    re.compile(r"errno[ =:]+(?P<n>\d{1,3})\b"),
    re.compile(r": (?P<text>[A-Z][A-Za-z/ ,-]+) [\[(](?P<n>\d{1,3})[\])]"),
    re.compile(r"error: (?P<text>[A-Z][A-Za-z/ ,-]+)$"),
)
_OF_A_PEER: Final = frozenset({"ECONNRESET", "EPIPE", "ECONNREFUSED"})
"""Most often a consequence: the peer is gone."""
_EXITS = (
    re.compile(
        r"\(exit code: -(?P<python>\d+)\)|exitcode[=: ]+-(?P<process>\d+)"
        r"|killed by signal (?P<waited>\d+)|signal: (?P<go>\d+)"
    ),
    re.compile(r"[Ee]xit(?:ed)?(?: with)?(?: status| code)?[:= ]+(?P<shell>1[2-9]\d|2[0-4]\d)\b"),
    re.compile(
        r"(?P<words>Segmentation fault|Bus error|Illegal instruction|Floating point exception|Aborted)"
        r"(?: \(core dumped\))?\.?$"
    ),
    re.compile(r"(?:^|\s)(?P<words>Killed)$"),
    re.compile(r"killed by (?P<name>SIG[A-Z]+)"),
)
_BY_WORDS: Final = {
    "Segmentation fault": "SIGSEGV",
    "Bus error": "SIGBUS",
    "Illegal instruction": "SIGILL",
    "Floating point exception": "SIGFPE",
    "Aborted": "SIGABRT",
    "Killed": "SIGKILL",
}
_OUT_OF_MEMORY = re.compile(r"oom[-_ ]kill|Out of memory: Killed process|OOMKilled|Memory cgroup out of memory")
_XID = re.compile(r"NVRM: Xid \(.*?\): (?P<number>\d+)")
_TERMINATE = re.compile(r"terminate called after throwing an instance of '(?P<what>[^']+)'")


def explained(text: str) -> Meaning | None:
    """What a line of a failure means by its family; None when none knows it.

    Only for lines that tell of a failure: a word of these may stand in any line.
    """
    asked = (_out_of_memory, _xid, _missing, _cuda, _nccl, _ibverbs, _phrase, _terminate, _errno, _exit)
    return next((meaning for family in asked if (meaning := family(text)) is not None), None)


@cache
def literals() -> frozenset[str]:
    """Each line that a family knows has one of these: what a long log is searched for first."""
    table = _table()
    return frozenset(
        {
            "oom", "OOM", "ut of memory", "NVRM: Xid", "shared object file", "from shared object", "undefined symbol",
            "fatal error: ", "compiler", "No such file", "not found", "ould not find", "CUDA", "cuda", "driver", "GPU",
            "NCCL", "nccl", " error", "rrno", "xit", "killed by", "signal", "terminate called", *_BY_WORDS,
            *(entry["contains"] for entry in table["phrases"]),
            *(entry["text"] for entry in (*table["errno"], *table["ibverbs"])),
        }
    )  # fmt: skip


@cache
def _table() -> dict[str, list[dict[str, Any]]]:
    table: dict[str, list[dict[str, Any]]] = json.loads(files(__package__).joinpath("families.json").read_text())
    return table


def _out_of_memory(text: str) -> Meaning | None:
    if not _OUT_OF_MEMORY.search(text):
        return None
    fix = "Give the job or container more memory, or load less: fewer nodes on the host, a smaller cache"
    return Meaning("oom-killer", "root", "os", "the kernel killed a process because memory ran out", fix)


def _xid(text: str) -> Meaning | None:
    match = _XID.search(text)
    if match is None:
        return None
    cause = f"the GPU reported Xid {match['number']}: a fault of it, or of what ran on it"
    return Meaning("gpu-xid", "root", "os", cause, "NVIDIA's list of Xid errors; `nvidia-smi -q` shows the GPU's state")


def _missing(text: str) -> Meaning | None:
    for entry in _table()["missing"]:
        if match := re.search(entry["pattern"], text):
            what = next((value for value in match.groups() if value), "")
            cause, fix = entry["cause"].format(what=what), entry["fix"].format(what=what)
            return Meaning(entry["id"], "root", "install", cause, fix)
    return None


def _cuda(text: str) -> Meaning | None:
    match = _CUDA_NUMBER.search(text)
    number = int(match["number"]) if match else None
    for entry in _table()["cuda"]:
        if entry["number"] == number or any(_names_it(name, text) for name in entry["names"]):
            cause = f"{entry['cause']} (CUDA error {entry['number']})"
            return Meaning(f"cuda-{entry['number']}", "root", "self", cause, entry["fix"])
    return None


def _names_it(name: str, text: str) -> bool:
    return name in text and (name.startswith(("cuda", "CUDA_")) or _CUDA_CONTEXT.search(text) is not None)


def _nccl(text: str) -> Meaning | None:
    for entry in _table()["nccl"]:
        if entry["name"] in text or ("NCCL" in text and entry["text"] in text):
            return Meaning(entry["name"], entry["kind"], "self", entry["cause"], entry["fix"])
    return None


def _ibverbs(text: str) -> Meaning | None:
    if not _IBVERBS_CONTEXT.search(text):
        return None
    for entry in _table()["ibverbs"]:
        if entry["text"] in text:
            name = f"ibverbs-{entry['text'].replace(' ', '-')}"
            fix = (
                "Test the path between the two hosts with ib_send_bw on these devices; see device_name and MC_GID_INDEX"
            )
            return Meaning(name, entry["kind"], "network", f"{entry['cause']} ({entry['text']})", fix)
    return None


def _phrase(text: str) -> Meaning | None:
    for entry in _table()["phrases"]:
        if entry["contains"] in text:
            return Meaning(entry["id"], "root", entry["root"], entry["cause"], entry["fix"])
    return None


def _terminate(text: str) -> Meaning | None:
    match = _TERMINATE.search(text)
    if match is None:
        return None
    fix = "The line after it (`what():`) says why; versions that do not go together are the usual reason"
    return Meaning(
        "terminate", "root", "self", f"a C++ library met an exception that nobody caught: {match['what']}", fix
    )


def _errno(text: str) -> Meaning | None:
    name = next(_errnos(text), None)
    if name is None:
        return None
    usual = {
        "name": name,
        "text": "",
        "cause": "the system refused something",
        "fix": "The lines above say what was tried",
    }
    entry = next((entry for entry in _table()["errno"] if entry["name"] == name), usual)
    path = _path_in(text)
    place, place_fix = _place(text, path)
    words = {"path": path or "a file", "place": place, "place_fix": place_fix}
    kind: Kind = "symptom" if name in _OF_A_PEER else "root"
    known_as = f"{name}: {entry['text']}" if entry["text"] else name
    return Meaning(
        f"errno-{name}", kind, "os", f"{entry['cause'].format(**words)} ({known_as})", entry["fix"].format(**words)
    )


def _errnos(text: str) -> Iterator[str]:
    by_text = {entry["text"]: entry["name"] for entry in _table()["errno"]}
    for form in _ERRNO_FORMS:
        match = form.search(text)
        if match is None:
            continue
        parts = match.groupdict()
        text_of_it = parts.get("text")
        name = errno.errorcode.get(int(parts["n"])) if text_of_it is None else by_text.get(text_of_it.strip())
        if name is not None:
            yield name


def _path_in(text: str) -> str | None:
    match = _PATH.search(text)
    return (match["quoted"] or match["bare"]) if match else None


def _place(text: str, path: str | None) -> tuple[str, str]:
    """Which disk a line speaks of, and how to make room there."""
    for entry in _table()["places"]:
        if re.search(entry["pattern"], text):
            return entry["place"], entry["fix"]
    return (f"the disk of {path}" if path else "a disk"), "Free space there"


def _exit(text: str) -> Meaning | None:
    for form in _EXITS:
        match = form.search(text)
        if match is None:
            continue
        parts = {key: value for key, value in match.groupdict().items() if value is not None}
        for entry in _table()["signals"]:
            if entry["number"] == _number(parts) or entry["name"] == (
                parts.get("name") or _BY_WORDS.get(parts.get("words", ""))
            ):
                return Meaning(
                    f"killed-{entry['name']}", "root", "self", f"{entry['cause']} ({entry['name']})", entry["fix"]
                )
    return None


def _number(parts: dict[str, str]) -> int | None:
    """Of the signal, from one of the ways in which exits are told; a shell adds 128."""
    if "shell" in parts:
        return int(parts["shell"]) - 128
    return next((int(value) for key, value in parts.items() if key not in ("words", "name")), None)
