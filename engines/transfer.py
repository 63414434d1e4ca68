"""Does KV move? The one rule, from what a decode node says it computed itself.

A miswired transfer fails nothing: the decode node computes every prompt again, and answers. A node whose KV comes by
transfer computes at most the last token of a prompt: hybrid models (Mamba, GDN) transfer all but one
(mooncake_connector.py, `get_num_new_matched_tokens`); what its own prefix cache has it neither computes nor fetches.
"""

from dataclasses import dataclass

ENOUGH_HAND_OFFS = 3
_SHARE_COMPUTED = 0.5
"""Of the tokens handed over. A decode node's own prefix cache takes its share of a prompt without any transfer."""


@dataclass(slots=True)
class Transfer:
    """What was handed over to a decode node in some time, and what it counted in that time."""

    hand_offs: int = 0
    prompt_tokens: int = 0
    computed: float = 0
    """Prompt tokens that it computed itself, those of other requests included."""
    transferred: float = 0

    @property
    def is_moving(self) -> bool:
        return self.transferred > 0

    @property
    def is_not_moving(self) -> bool:
        """Nothing came, and what was handed over was computed; after too few hand-offs nobody can say."""
        enough = self.hand_offs >= ENOUGH_HAND_OFFS
        return enough and not self.is_moving and self.computed >= _SHARE_COMPUTED * self.prompt_tokens

    @property
    def is_whole(self) -> bool:
        """Every handed prompt came: all but its last token by transfer, or at most that was computed.

        The first holds whatever else the node was asked, the second whatever its own prefix cache had.
        """
        came = self.transferred >= self.prompt_tokens - self.hand_offs
        return self.is_moving and (came or self.computed <= self.hand_offs)
