"""TextPieces: token ids one by one -> text as soon as its characters are complete."""

from transformers import PreTrainedTokenizerBase

# What a tokenizer puts for bytes that are not a whole character yet.
_BROKEN = "\N{REPLACEMENT CHARACTER}"

# Tokens before the newest that are decoded along: enough for tokenizers that join words with what stands before.
_CONTEXT_TOKENS = 6


class TextPieces:
    """Decodes an answer piece by piece.

    Args:
        tokenizer: special tokens of it are left out of the text.
    The pieces joined equal `text`, the whole answer decoded at once, for tokenizers whose text of a token depends on
    at most the six before it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        # token counts at which all characters were complete: decoding may start there, and nowhere else, because a
        # tokenizer that falls back to bytes gives no character of a run that it sees only in part
        self._boundaries = [0]

    @property
    def text(self) -> str:
        """All tokens so far, decoded at once."""
        return self._decode(self._ids)

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def add(self, token_id: int) -> str:
        """Text that this token completes; empty while a character waits for more bytes."""
        self._ids.append(token_id)
        return self._advance(is_end=False)

    def finish(self) -> str:
        """What is left at the end, broken characters included."""
        return self._advance(is_end=True)

    def _advance(self, *, is_end: bool) -> str:
        start, shown = self._boundaries[0], self._boundaries[-1]
        before = self._decode(self._ids[start:shown])
        now = self._decode(self._ids[start:])
        if not is_end and now.endswith(_BROKEN):
            return ""
        if len(self._ids) > shown:
            self._boundaries.append(len(self._ids))
        while len(self._boundaries) > 1 and self._boundaries[1] <= len(self._ids) - _CONTEXT_TOKENS:
            del self._boundaries[0]
        return now[len(before) :]
