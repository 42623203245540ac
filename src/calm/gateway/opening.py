"""The first word of an answer, without the white space before it.

A model that continues text begins with the space after "Answer:"; whoever asked a chat model does not want
it. Only for cards that say `chat.trim`, so that no other answer is touched.
"""

from __future__ import annotations

import msgspec

_choices = msgspec.json.Decoder(list[dict[str, object]]).decode


class Opening:
    """Takes the white space before the first word off every choice of one answer, whole or in chunks."""

    def __init__(self) -> None:
        self._begun: set[object] = set()

    def trim(self, choices: bytes) -> bytes:
        """The `choices` of one payload, JSON to JSON. What has another shape comes back as it was."""
        try:
            read = _choices(choices)
        except msgspec.MsgspecError:
            return choices
        for choice in read:
            self._trim(choice)
        return msgspec.json.encode(read)

    def _trim(self, choice: dict[str, object]) -> None:
        said = choice.get("delta") or choice.get("message")
        content = said.get("content") if isinstance(said, dict) else None
        if not isinstance(said, dict) or not isinstance(content, str) or choice.get("index") in self._begun:
            return
        said["content"] = content.lstrip()
        if said["content"]:
            self._begun.add(choice.get("index"))
