"""The decoding engine: requests in, text out row by row; who is done makes room for who waits.

    engine = Engine(model, eos_id=tokenizer.eos_id, tokenizer=tokenizer, slots=8)
    engine.submit(Request(prompt, Sampling(temperature=0.8, seed=1), max_new_tokens=100, stop=("\n\n",)))
    for event in engine.events():
        print(event.request, event.text, event.ending)

A cache has a slot for each row that is written at a time. A slot remembers its tokens when its row is done, so a
prompt that begins like what any slot holds follows a copy of that, and only the rest is read: that is how branches
fork, how a conversation goes on and how prompts share what they begin with. Prompts are read in chunks, between which
the other rows are written on. Where the model's rows are divided over devices, each has its own slots and shares
nothing with the others.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from vishwamai_eqx import decode, kv_cache
from vishwamai_eqx.decode import STRIDE, CachedModel, Chunk, Guide, Orders, Rows, Where
from vishwamai_eqx.sampling import DEFAULT, Sampling, seeded, settings_of
from vishwamai_eqx.stopping import Decodes, Text

# Pieces of prompts and caches are padded to powers of two from here, so that few shapes are ever compiled.
SMALLEST_BUCKET = 16
# Tokens of prompts that are read between two strides: about what a stride of many rows takes.
CHUNK = 512
# A prompt waits for another that is being read if it saves reading so many tokens.
WORTH_WAITING = 16

Ending = Literal["", "end", "stop", "length"]
"""Why a row is done: its end-of-text token, a stop string, its number of tokens; nothing while it goes on."""


@dataclass(frozen=True)
class Request:
    """A row to write."""

    prompt: Sequence[int]
    sampling: Sampling = DEFAULT
    max_new_tokens: int = 128
    stop: Sequence[str] = ()
    """Strings that end the text, and are not in it."""
    forced: Sequence[int] = ()
    """What the first tokens are to be, whatever the draw: their log-probabilities are what is wanted."""


class Event(NamedTuple):
    """What a row has come to."""

    request: int
    """The number that `submit` gave."""
    tokens: list[int]
    """New ones."""
    logprobs: list[float]
    """What the model itself says of them, before penalties, temperature and cuts."""
    text: str
    """New, and final: what may be a stop string's beginning comes later or never. Empty without a tokenizer."""
    ending: Ending


@dataclass
class Result:
    """A row that is done."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    ending: Ending = ""

    def add(self, event: Event) -> None:
        self.tokens += event.tokens
        self.logprobs += event.logprobs
        self.text += event.text
        self.ending = event.ending


@dataclass
class _Row:
    """A request that has a slot."""

    number: int
    request: Request
    prompt: list[int]
    text: Text | None
    left: int
    written: int = 0


@dataclass
class _Slot:
    """A row of the cache."""

    held: list[int] = field(default_factory=list)
    """The tokens that it has read."""
    row: _Row | None = None
    source: int | None = None
    """The slot whose first `start` tokens this one's row is to follow, while that has not been copied."""
    start: int = 0
    used: int = 0
    """When."""

    @property
    def known(self) -> int:
        """Tokens of the row that have been read, or will have been once they are copied."""
        return len(self.held) if self.source is None else self.start

    @property
    def unread(self) -> int:
        """Tokens of the prompt still to be read."""
        return 0 if self.row is None else max(0, len(self.row.prompt) - self.known)

    @property
    def writes(self) -> bool:
        return self.row is not None and self.unread == 0


class Engine:
    """Writes what is submitted, `slots` rows at a time.

    `eos_id` ends a row and is not among its tokens. `max_length` is the context that the model was trained for.
    `pieces` are the ids that the tokenizer has; those that pad the vocabulary are never drawn. A `tokenizer` makes text
    of the tokens, which stop strings need. With `drafts` each step tries as many tokens of what the row already has, or
    of a `guide`, which lies on the same mesh: see `decode.write`. The models' arrays are used where they lie, and are
    never copied.
    """

    def __init__(
        self,
        model: CachedModel,
        *,
        eos_id: int,
        tokenizer: Decodes | None = None,
        slots: int = 8,
        max_length: int | None = None,
        pieces: int | None = None,
        chunk: int = CHUNK,
        stride: int = STRIDE,
        drafts: int = 0,
        guide: Guide | None = None,
    ):
        self.model, self.at, self.tokenizer = model, decode.where(model), tokenizer
        self.eos_id, self.max_length = eos_id, max_length
        self.pieces = np.iinfo(np.int32).max if pieces is None else pieces
        self.chunk, self.stride, self.drafts = bucket(chunk), stride, drafts
        # What a step may take back, what a stride writes past a row's end, and the token that a prompt which is known
        # already is read from again.
        self.slack = stride * (drafts + 1) + drafts + 1
        self.per_shard = -(-slots // self.at.shards)
        self.slots = [_Slot() for _ in range(self.per_shard * self.at.shards)]
        self.length = 0
        self.rows: Rows | None = None
        self.guide = guide
        self.guided: Rows | None = None
        self.guide_at = None if guide is None else decode.where(guide.model)
        self.most = 1 if guide is None else guide.pieces.shape[1]
        self.counts = None if guide is None else np.asarray(guide.counts)
        self.waiting: list[_Row] = []
        self.submitted = self.ticks = self.read = self.written = self.steps = 0

    def submit(self, request: Request) -> int:
        """Its number, which its events will have.

        **Raises** ValueError if the prompt is empty, or is with its new tokens longer than `max_length`.
        """
        prompt, new = len(request.prompt), request.max_new_tokens
        if new < 1:
            raise ValueError(f"max_new_tokens={new} must be at least 1.")
        if prompt == 0:
            raise ValueError("prompt: it has no token; begin it with [BOS] at least.")
        if self.max_length is not None and prompt + new > self.max_length:
            raise ValueError(
                f"max_new_tokens={new}: with the prompt's {prompt} tokens it is over the model's context of "
                f"{self.max_length}; take "
                + (
                    f"at most {self.max_length - prompt} or a shorter prompt."
                    if prompt < self.max_length
                    else "a shorter prompt."
                )
            )
        if "" in request.stop:
            raise ValueError("stop='' must have a character; leave it out to stop nowhere.")
        if request.stop and self.tokenizer is None:
            raise ValueError(f"stop={list(request.stop)} needs a tokenizer; give the engine one.")
        number = self.submitted
        self.submitted += 1
        text = None if self.tokenizer is None else Text(self.tokenizer, request.stop)
        self.waiting.append(_Row(number, request, list(request.prompt), text, new))
        return number

    def cancel(self, number: int) -> None:
        """Write no more of it."""
        self.waiting = [row for row in self.waiting if row.number != number]
        for slot in self.slots:
            if slot.row is not None and slot.row.number == number:
                self._free(slot)

    def events(self) -> Iterator[Event]:
        """What becomes of all that is submitted, as it is written; more may be submitted meanwhile."""
        while self.waiting or any(slot.row for slot in self.slots):
            self._read_prompts()
            if any(slot.writes for slot in self.slots):
                yield from self._write()

    def run(self, requests: Sequence[Request]) -> list[Result]:
        """What becomes of each."""
        results = {self.submit(request): Result() for request in requests}
        for event in self.events():
            if event.request in results:
                results[event.request].add(event)
        return list(results.values())

    def score(self, prompt: Sequence[int], labels: Sequence[Sequence[int]]) -> list[float]:
        """The log-probability of each label, as what follows the prompt, which is read once."""
        requests = [Request(prompt, Sampling(0.0), len(label), forced=label) for label in labels]
        return [sum(result.logprobs) for result in self.run(requests)]

    @property
    def acceptance(self) -> float:
        """The share of the drafts that were kept."""
        return (self.written - self.steps) / max(1, self.steps * self.drafts)

    def _read_prompts(self) -> None:
        """Give slots to who waits, and read prompts: all, or a chunk where rows are waiting to be written on."""
        self._admit()
        spent = 0
        while any(slot.unread for slot in self.slots):
            # What follows a row is copied before that goes on.
            forks = any(slot.source is not None for slot in self.slots)
            if not forks and spent >= self.chunk and any(slot.writes for slot in self.slots):
                return
            spent += self._read_chunk()
            self._admit()

    def _admit(self) -> None:
        self.ticks += 1
        put_off = []
        for position, row in enumerate(self.waiting):
            if not (free := [i for i, slot in enumerate(self.slots) if slot.row is None and not self._pinned(i)]):
                self.waiting = put_off + self.waiting[position:]
                return
            prompt = row.prompt
            found = [self._usable(i, prompt) for i in range(len(self.slots))]
            best = {shard: max(self._of(shard), key=lambda i: found[i]) for shard in {self._shard(i) for i in free}}
            shard = max(best, key=lambda shard: (found[best[shard]], sum(self._shard(i) == shard for i in free)))
            source = best[shard]
            if self._worth_waiting(prompt, found[source]):
                put_off.append(row)
                continue
            own = [i for i in free if self._shard(i) == shard]
            # What lies unused the longest makes room, and the row that is followed only if there is no other.
            chosen = min(own, key=lambda i: (i == source and found[source] > 0, self.slots[i].used))
            self._give(chosen, row, source, found[source])
        self.waiting = put_off

    def _give(self, chosen: int, row: _Row, source: int, start: int) -> None:
        self._make_room(len(row.prompt) + row.request.max_new_tokens)
        slot = self.slots[chosen]
        slot.row, slot.used, slot.start, slot.source = row, self.ticks, start, source
        if not start or source == chosen:
            slot.source, slot.held = None, slot.held[:start]

    def _usable(self, i: int, prompt: list[int]) -> int:
        """Tokens of the prompt that need not be read if it follows slot i; its last one always is, for the logits."""
        slot = self.slots[i]
        if slot.source is not None:
            return 0
        same = min(common(slot.held, prompt), len(prompt) - 1)
        # A ring that has gone round does not hold what came long before.
        return same if self._has_all(len(slot.held)) or same >= len(slot.held) - self.slack else 0

    def _has_all(self, tokens: int) -> bool:
        """Whether a row of so many tokens can be taken back to any of them."""
        return self.ring is None or tokens <= self.ring

    @functools.cached_property
    def ring(self) -> int | None:
        """Slots of the shortest ring that this model's caches ever have."""
        longest = jax.eval_shape(lambda: self.model.new_cache(1, 2**30, self.slack))
        rings = [kv_cache.shortest_ring(longest)]
        if (guide := self.guide) is not None:
            ring = kv_cache.shortest_ring(
                jax.eval_shape(lambda: guide.model.new_cache(1, 2**30, self.slack * self.most))
            )
            rings.append(ring and ring // self.most)
        return min((ring for ring in rings if ring), default=None)

    def _worth_waiting(self, prompt: list[int], found: int) -> bool:
        """Whether a row that is being read will have much more of the prompt than what there is to follow."""
        return any(
            self._shared(slot, prompt) >= found + WORTH_WAITING and self._shared(slot, prompt) > slot.known
            for slot in self.slots
            if slot.row is not None and slot.unread > 0
        )

    def _shared(self, slot: _Slot, prompt: list[int]) -> int:
        assert slot.row is not None
        return min(common(slot.row.prompt, prompt), len(prompt) - 1)

    def _read_chunk(self) -> int:
        """Read a piece of each of some prompts, the tokens for which there was room; of forks first."""
        readers = [i for i, slot in enumerate(self.slots) if slot.unread]
        readers = [i for i in readers if self.slots[i].source is not None] or readers
        wanted = {i: self._next(self.slots[i]) for i in readers}
        # The first, and with it those that are not longer.
        first = min(readers, key=lambda i: self._number(i))
        seq = bucket(wanted[first])
        # Two programs for each length: of one prompt, and of as many as make a chunk.
        room = max(1, min(self.per_shard, self.chunk // seq))
        shards: list[list[int]] = [[] for _ in range(self.at.shards)]
        for i in readers:
            if wanted[i] <= seq and len(shards[self._shard(i)]) < room:
                shards[self._shard(i)].append(i)
        pieces = 1 if max(map(len, shards)) == 1 else room
        size = pieces * self.at.shards
        source, start, row, new = (np.zeros(size, np.int32) for _ in range(4))
        tokens = np.zeros((size, seq), np.int32)
        row[:] = self.per_shard
        before: list[list[int]] = [[] for _ in range(size)]
        for shard, chosen in enumerate(shards):
            for at, i in enumerate(chosen, shard * pieces):
                slot = self.slots[i]
                assert slot.row is not None
                follows = i if slot.source is None else slot.source
                known = slot.held if slot.source is None else self.slots[follows].held[: slot.start]
                piece = slot.row.prompt[len(known) : len(known) + wanted[i]]
                before[at] = known
                source[at], start[at], row[at] = follows % self.per_shard, len(known), i % self.per_shard
                tokens[at, : len(piece)], new[at] = piece, len(piece)
                slot.held, slot.source = known + piece, None
                self.read += len(piece)
        chunk = Chunk(source, start, row, tokens, new)
        self.rows = decode.prefill(self.model, self.rows, chunk, at=self.at)
        if self.guide is not None:
            chunk = self._in_pieces(chunk, before)
            self.guided = decode.prefill(self.guide.model, self.guided, chunk, at=self.guide_at)
        return tokens.size

    def _in_pieces(self, chunk: Chunk, before: list[list[int]]) -> Chunk:
        """What the guide is to read, given what comes before each piece of a prompt."""
        assert self.guide is not None and self.counts is not None
        pieces, offset = np.asarray(self.guide.pieces), np.arange(self.most)
        read = [tokens[:new] for tokens, new in zip(chunk.tokens, chunk.new, strict=True)]
        own = [pieces[tokens][offset < self.counts[tokens][:, None]] for tokens in read]
        tokens = np.zeros((len(own), bucket(max(map(len, own)))), np.int32)
        for row, ids in zip(tokens, own, strict=True):
            row[: len(ids)] = ids
        start = np.array([self.counts[known].sum() for known in before], np.int32)
        return chunk._replace(start=start, tokens=tokens, new=np.array([len(ids) for ids in own], np.int32))

    def _number(self, i: int) -> int:
        row = self.slots[i].row
        assert row is not None
        return row.number

    def _next(self, slot: _Slot) -> int:
        """Tokens of a prompt to read next."""
        assert slot.row is not None
        unread = min(slot.unread, self.chunk)
        begun = slot.known
        if not self._has_all(begun + unread):
            # Others that share a beginning follow this row where theirs ends, and can do so only while it is there.
            ends = [self._shared(slot, row.prompt) for row in self.waiting]
            unread = min([end - begun for end in ends if end > max(begun, WORTH_WAITING)] + [unread])
        return unread

    def _write(self) -> Iterator[Event]:
        rows = [slot.row if slot.writes else None for slot in self.slots]
        forced = np.full((len(rows), self.stride * (self.drafts + 1)), -1, np.int32)
        for i, row in enumerate(rows):
            if row is not None:
                given = row.request.forced[row.written : row.written + forced.shape[1]]
                forced[i, : len(given)] = given
        orders = Orders(
            settings_of(
                [Sampling(0.0) if row is None else row.request.sampling for row in rows],
                [0 if row is None else len(row.prompt) for row in rows],
            ),
            np.array([0 if row is None else row.left for row in rows], np.int32),
            forced,
            np.int32(self.eos_id),
            np.int32(self.pieces),
        )
        assert self.rows is not None
        options = {"at": self.at, "guide_at": self.guide_at, "drafts": self.drafts, "steps": self.stride}
        self.rows, self.guided, written = decode.write(
            self.model, self.rows, self.guide, self.guided, orders, **options
        )
        # Of several processes each has some rows, and tells the others.
        tokens, logprobs, counts = (multihost_utils.process_allgather(each, tiled=True) for each in written)
        self.ticks += 1
        self.steps += int((counts > 0).sum())
        for i, row in enumerate(rows):
            if row is None:
                continue
            taken = np.arange(tokens.shape[2]) < counts[:, i, None]
            self.written += int(taken.sum())
            yield from self._take(self.slots[i], row, tokens[:, i][taken].tolist(), logprobs[:, i][taken].tolist())

    def _take(self, slot: _Slot, row: _Row, tokens: list[int], logprobs: list[float]) -> Iterator[Event]:
        """Note what a row has got; what follows its end is none of it."""
        slot.held = slot.held + tokens
        slot.used = self.ticks
        row.written += len(tokens)
        row.left -= len(tokens)
        ending: Ending = "length" if row.left == 0 else ""
        if tokens[-1] == self.eos_id:
            tokens, ending = tokens[:-1], "end"
        text = ""
        if row.text is not None:
            before = len(row.text.ids)
            text = row.text.add(tokens, last=bool(ending))
            if row.text.stopped:
                tokens, ending = row.text.ids[before:], "stop"
        if ending:
            self._free(slot)
        yield Event(row.number, tokens, logprobs[: len(tokens)], text, ending)

    def _free(self, slot: _Slot) -> None:
        slot.row = slot.source = None

    def _make_room(self, tokens: int) -> None:
        """Caches of rows that long; a row at its end still has a place for what is not written."""
        length = bucket(tokens + 1)
        if length <= self.length:
            return
        self.rows = self._longer(self.model, self.rows, self.at, length, self.slack)
        if self.guide is not None:
            # Most tokens are few pieces; past the end of its rows a guide reads nothing more, and drafts worse.
            longer = length * min(2, self.most)
            assert self.guide_at is not None
            slack = self.slack * self.most
            self.guided = self._longer(self.guide.model, self.guided, self.guide_at, longer, slack)
        self.length = length

    def _longer(self, model: CachedModel, rows: Rows | None, at: Where, length: int, slack: int) -> Rows:
        if rows is None:
            return decode.new_rows(model, at=at, rows=len(self.slots), length=length, slack=slack)
        return decode.grow(model, rows, at=at, length=length, slack=slack)

    def _shard(self, i: int) -> int:
        return i // self.per_shard

    def _of(self, shard: int) -> range:
        """Its slots."""
        return range(shard * self.per_shard, (shard + 1) * self.per_shard)

    def _pinned(self, i: int) -> bool:
        """Whether a row is to follow this slot and has not done so yet."""
        return any(slot.source == i for slot in self.slots)


def generate(
    model: CachedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_id: int,
    sampling: Sampling = DEFAULT,
    max_length: int | None = None,
    pieces: int | None = None,
) -> list[list[int]]:
    """Each prompt's new tokens; row i draws with a seed of its own, made of the sampling's and i."""
    engine = Engine(model, eos_id=eos_id, slots=len(prompts), max_length=max_length, pieces=pieces)
    requests = [
        Request(prompt, each, max_new_tokens)
        for prompt, each in zip(prompts, seeded(sampling, len(prompts)), strict=True)
    ]
    return [result.tokens for result in engine.run(requests)]


def common(held: list[int], prompt: list[int]) -> int:
    """Tokens that both begin with."""
    at, step = 0, 8
    # Most differ at once; of what is alike, longer and longer parts are compared.
    while step and at < min(len(held), len(prompt)):
        if held[at : at + step] == prompt[at : at + step]:
            at, step = at + step, 2 * step
        else:
            step //= 2
    return min(at, len(held), len(prompt))


def bucket(length: int) -> int:
    """The next power of two."""
    return max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())
