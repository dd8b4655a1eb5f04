"""From raw files to the batch of step s, exactly, on any number of ranks.

    raw files -- sources.py, images.py, text.py, audio.py --> samples of bytes
    samples   -- shards.py ShardWriter -------------------->  shard-000000.tar + .offsets.npy
    shards    -- reader.py Shards ------------------------->  samples again, checked
    tokens    -- tokens.py TokenSet ----------------------->  sample i of a split, one read
    rows      -- rows.py FixedRows, PackedRows ------------>  rows of T tokens, an epoch's worth
    order     -- order.py Permutation, Interleave --------->  which row stands at position p
    batches   -- batches.py Mixture, Loader --------------->  the batch of step s, rank r's slice
    ledger    -- ledger.py Ledger, verify ----------------->  proof of what was consumed

State to resume: two integers, the step and the position (rows consumed before it).

Names that the other rooms use (import them from here or from their modules; the package
itself imports nothing, so that the command line stays quick):

shards.py
    ShardWriter(folder, number, split)           context manager; one shard, complete or absent
        .write(key, {"png": bytes, "json": dict, "tokens.npy": array, ...}, tokens=0, raw_bytes=0)
        .skip(what, where, reason)               one line of skipped.jsonl   .skipped so far
    finished(folder, number) -> dict | None      the entry of a shard that is already whole
    finish(folder, kind=, modality=, shards=, classes=None, **header) -> dict
        index.json and skipped.jsonl from the entries of all shards; drops the entry files
    key_of(number) -> "00000017"
reader.py
    ShardError(RequestError)                     names the shard and the first bad sample
    Shards.open(folder, on_damage="stop" | "skip-and-count")
        .index .modality .classes .entries       (entries: index["shards"])
        .count(split) -> int
        .iterate(split, start=0) -> Iterator[Sample]       sequential; counts and sha256 checked
        .iterate_shard(number) -> Iterator[Sample]         the same for one shard
        .read(split, i) -> Sample                one pread (None: damaged, skip-and-count)
        .damaged                                 samples given up so far under skip-and-count
    Sample: .key .members (ext -> bytes) .meta (dict of key.json)
        .image() uint8 (H, W, C)   .text() str   .audio() (int16 (T,), rate)   .tokens() array
        .raw(modality)                           the decoded sample: image, text or audio array
tokens.py
    TokenSet.open(folder, split="train", on_damage="stop")
        .samples .tokens .vocabulary (Vocabulary) .tokenizer_fingerprint .tokenizer_kind .grid
        .classes .modality .raw_bytes .fingerprint .lengths (int64 (samples,), from the offsets)
        [i] -> (tokens, meta)                    array as stored, dict of key.json
vocabulary.py
    Vocabulary(size=, ranges=, specials=)
    join([Vocabulary, ...]) -> (Vocabulary, [int64 table (size_k,) old id -> joint id, ...])
batches.py
    mixture_of([TokenSet, ...], context=None, weights=None, seed=0, shuffle=True) -> Mixture
        rows of `context` tokens: whole samples where all have that length (context None: the
        grid's size), else documents packed into windows. Sets of several tokenizers are moved
        into their joint vocabulary: mixture.vocabulary
    joint_vocabulary([TokenSet, ...]) -> (Vocabulary, [table or None, ...])
    Mixture: .context .vocabulary .members (of .tokens, .rows; len(rows) rows an epoch, rows.waste)
        .epochs(position) -> epochs each set went through
        .batch(position, size, rank=0, world_size=1, step=0) -> Batch
    Batch: .x (B, T) long, row-major for grids     .cond (B,) long or None (labels, -1: none)
           .captions (B, n) long or None (tokens, -1: past the end)
           .documents (B, T) long or None         .mask (B, T) bool or None (False on padding)
           .step .position .ids (B lists of Piece(set, epoch, sample, start, stop))
           .tokens (positions that count)   .to(device)   .split(n) -> micro-batches
    Loader(mixture, batch_size, rank=0, world_size=1, step=0, position=None, workers=1, ahead=4,
        pin=False)
        an endless iterator of rank r's slice of each global batch; a context manager
        batch_size: int, or [(from_step, size), ...] for a ramp
        .state() -> {"step": s, "position": p} of the next batch    .stalled seconds waited
        .skip(rows)                               pass over a data window
    sequential(mixture, batch_size, rank=0, world_size=1) -> Iterator[Batch]   validation: each
        row once (shuffle=False: in order); all ranks get as many batches; the last may be
        short, and a rank without a row of it gets one whose mask is all False
ledger.py
    write_header(folder, mixture)                rank 0, at the start of a run
    rewind(folder, step)                         rank 0, at a resume: drop what steps >= step wrote
    Ledger(folder, rank)   .record(batch)   .pass_over(mixture, position, rows, step)   .close()
    read(folder, unfinished=False) -> Book       all ranks' records, their checksums compared
    verify(book) -> list[Finding]                jobs/verify.py prints them
"""
