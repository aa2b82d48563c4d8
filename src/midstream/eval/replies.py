"""Fixed replies as tokens: the same rule for Midstream's models and for other people's."""

from collections.abc import Callable, Sequence

Encode = Callable[[str], list[int]]


def reply_tokens(encode: Encode, prompt: str, replies: Sequence[str]) -> list[list[int]]:
    """What a model writes behind `prompt` to give each reply: the first tokens where these differ
    from one another, else whole replies.

    encode: ids of a text, no special token added. `prompt` is the text that the replies stand
    behind, "" where they begin a text of their own; the replies hold the space that parts them from
    it. A reply that would melt into the prompt's last token is tokenised as one that begins a line.
    """
    whole = [_behind(encode, prompt, reply) for reply in replies]
    first = [ids[:1] for ids in whole]
    return first if len({tuple(ids) for ids in first}) == len(first) else whole


def _behind(encode: Encode, prompt: str, reply: str) -> list[int]:
    for before in (prompt, "\n"):
        head, both = encode(before), encode(before + reply)
        if len(both) > len(head) and both[: len(head)] == head:
            return both[len(head) :]
    return encode(reply)
