"""Who may ask."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from proxy.serving import keys
from proxy.serving.keys import KeyRing, KeysError


def known(ring: KeyRing, key: str) -> str | None:
    return ring.name_of(b"Bearer " + key.encode())


def test_keys_have_names_and_nothing_else_is_known(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nalice sk-a # laptop\n\nsk-b\n")
    ring = KeyRing(["sk-env"], file)
    assert [known(ring, key) for key in ("sk-a", "sk-b", "sk-env", "alice", "", "sk-a sk-b")] == [
        "alice", "line-4", "key-1", None, None, None,
    ]  # fmt: skip
    for header in (None, b"", b"sk-a", b"Basic sk-a", b"Bearer"):
        assert ring.name_of(header) is None
    assert ring.name_of(b"bearer  sk-a ") == "alice"


def test_without_keys_none_is_needed() -> None:
    assert not KeyRing([], None).is_needed


@pytest.mark.parametrize(
    ("text", "says"),
    [(b"", "has no key in it"), (b"a b c\n", "line 1"), (b"\xff\xfe", "no text"), (None, "No such file")],
)
def test_a_file_that_cannot_be_used_is_said(tmp_path: Path, text: bytes | None, says: str) -> None:
    file = tmp_path / "keys"
    if text is not None:
        file.write_bytes(text)
    with pytest.raises(KeysError, match=says):
        KeyRing([], file)


def test_the_file_is_followed_and_one_that_cannot_be_used_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(keys, "_LOOK_EVERY_S", 0.005)
    file = tmp_path / "keys"
    file.write_text("old")
    ring = KeyRing([], file)

    async def until(holds: Callable[[], bool]) -> None:
        while not holds():
            await asyncio.sleep(0.005)

    async def story() -> None:
        following = asyncio.create_task(ring.follow())
        file.write_text("new-key")
        await until(lambda: known(ring, "new-key") is not None)
        assert known(ring, "old") is None
        file.write_text("")
        await until(lambda: "keys left as they were" in caplog.text)
        assert known(ring, "new-key") is not None
        following.cancel()

    asyncio.run(asyncio.wait_for(story(), 30))
