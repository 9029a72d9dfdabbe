"""The four tasks: documents, batches, scores. Read this first, then hmtl.py, then train.py.

Two sentences show all four tasks:

    [Ada Kell] works for [Nordex] .    [She] likes [the firm] .

    ner    named entities: spans with a type      Ada Kell PER, Nordex ORG
    emd    entity mentions: pronouns and          Ada Kell PER, Nordex ORG, She PER, the firm ORG
           nominals ("the firm") too
    rel    relations between entities             Ada Kell --Works_For--> Nordex
    coref  coreference: clusters of mentions      {Ada Kell, She}  {Nordex, the firm}

A `Document` holds sentences and annotations. A `Task` knows its annotation and draws batches of
documents. `make_batch` turns these into tensors. The scores equal those of CoNLL's two scripts,
conlleval and the coreference scorer. A span is (start, end), token offsets, the end inclusive.

Left out for the reader's sake, and found below the banner: coreference scores, BIOUL tags, reading
and checking files, cutting long documents, the built-in corpus.
"""

import gzip
import json
import math
import re
import runpy
import sys
from array import array
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain, zip_longest
from pathlib import Path

import numpy as np
import torch

# ------------------------------------------------------------------------- documents and tasks

@dataclass
class Document:
    """Sentences and what is annotated in them; offsets count tokens from the document's start.

    annotations: {key: rows}. "ner" and "emd" have a list per sentence of (start, end, label),
    "relations" a list per sentence of (start1, end1, start2, end2, label), "clusters" a list per
    cluster of (start, end). A missing key means not annotated; empty lists: nothing is there.
    """
    key: str
    sentences: list                      # of lists of words
    annotations: dict = field(default_factory=dict)

    def __len__(self):
        return sum(len(words) for words in self.sentences)

@dataclass
class Task:
    """One task: the annotation it learns, the dev score that training watches, its documents.

    Most tasks read single sentences, and each sentence becomes a document of its own. A task of
    `whole_documents` (coreference) reads one document at a time, has clusters and no labels.
    """
    name: str
    annotation: str
    validation_metric_name: str                            # a score that its head counts, or mean
    validation_metric_decreases: bool = False
    whole_documents: bool = False
    builtin_size: int = 60                                 # training documents, built-in corpus
    data: dict = field(default_factory=dict, init=False)   # "train", "dev", "test" -> documents
    order: dict = field(default_factory=dict, init=False)  # cache of `batch_order`

    def load_data(self, folder=None, max_tokens=sys.maxsize):
        """Reads train, dev and test from a folder, or makes them: all documents that carry its
        annotation. Coreference cuts training documents above max_tokens. Raises InputError."""
        for split in ("train", "dev", "test"):
            documents = read_split(folder, split, self) if folder else builtin_split(split, self)
            longest = max_tokens if split == "train" else sys.maxsize
            self.data[split] = self.parts(documents, longest)

    def parts(self, documents, max_tokens=sys.maxsize):
        """What the task reads at a time: documents of up to max_tokens, or (limit 1) sentences."""
        return cut_documents(documents, max_tokens if self.whole_documents else 1)

    def labels(self, split="train"):
        """The labels of the documents of a split, sorted; coreference has none."""
        if self.whole_documents:
            return []
        sentences = [d.annotations[self.annotation][0] for d in self.data[split]]    # one each
        return sorted({row[-1] for rows in sentences for row in rows})

    def documents_per_batch(self, batch_size):
        """batch_size sentences, or one whole document."""
        return 1 if self.whole_documents else batch_size

    def n_batches(self, batch_size):
        """Training batches in one pass over the data."""
        return math.ceil(len(self.data["train"]) / self.documents_per_batch(batch_size))

    def batch(self, n, batch_size, seed):
        """The documents of training batch number n = 0, 1, 2, ..., which follow from the arguments
        alone: a resumed run needs only the number of batches drawn."""
        n_passes, index = divmod(n, self.n_batches(batch_size))  # passes over the data before
        indices = self.batch_order(n_passes, batch_size, seed)[index]
        return [self.data["train"][i] for i in indices]

    def batch_order(self, n_passes, batch_size, seed):
        """The document indices of every batch of one pass over the data."""
        key = (n_passes, batch_size, seed)
        if key not in self.order:
            lengths = [len(d) for d in self.data["train"]]
            rng = np.random.default_rng([seed, *self.name.encode(), n_passes])     # a name as bytes
            batches = plan_batches(lengths, self.documents_per_batch(batch_size), rng)
            self.order = {key: batches}                    # cached until the next pass
        return self.order[key]

def plan_batches(lengths, size, rng):
    """Index arrays of batches in random order. Sentences of like lengths share a batch, because
    padding costs time; noise on the lengths makes every pass different."""
    noisy = np.array(lengths) * rng.uniform(0.9, 1.1, len(lengths))
    batches = np.split(np.argsort(noisy), range(size, len(lengths), size))
    return [batches[i] for i in rng.permutation(len(batches))]

TASKS = [Task("ner", "ner", "f1", builtin_size=300),          # in the order of the hierarchy
         Task("emd", "emd", "f1", builtin_size=200),
         Task("rel", "relations", "last-token", builtin_size=60),
         Task("coref", "clusters", "mean", whole_documents=True, builtin_size=120)]

# --------------------------------------------------------------------------------------- batches

class Vocabulary:
    """Words (lower-cased) and characters with their ids: 0 is padding, 1 unknown.

    words: padding, unknown, those of the training documents, then those only in the vector file.
    counts: of all but the last kind, in how many training documents a word is; inf for padding and
    unknown. contextual: `ContextualVectors`, a frozen encoder's output for whole sentences.
    """
    LONGEST = 40     # characters of a word that are read: a web address says little after that

    def __init__(self, words, chars, counts, more_words=(), contextual=None):
        self.words = [*words, *more_words]
        self.chars = chars
        self.counts = counts
        self.contextual = contextual or ContextualVectors()
        self.word_ids = {word: i for i, word in enumerate(self.words)}
        self.char_ids = {char: i for i, char in enumerate(chars)}

    @classmethod
    def from_documents(cls, documents, more_words=(), contextual=None):
        # Count documents (sentences cut from one share its key), not tokens: a name repeated in one
        # document is still unseen elsewhere.
        seen = {(d.key, word) for d in documents for words in d.sentences for word in words}
        counts = Counter(word for _, word in {(key, word.lower()) for key, word in seen})
        words = sorted(counts, key=lambda word: (-counts[word], word))
        more_words = [word for word in more_words if word not in counts]
        chars = sorted({char for _, word in seen for char in word})
        return cls(["", "<unknown>", *words], ["", "<unknown>", *chars],
                   [math.inf, math.inf, *(counts[word] for word in words)], more_words, contextual)

    def spelling(self, word):
        """The ids of a word's characters, then a 0 that separates it from the next."""
        return [*(self.char_ids.get(char, 1) for char in word[:self.LONGEST]), 0]

@dataclass
class Batch:
    """Documents as tensors: the sentences of all documents as rows, empty ones left out.

    B sentences, T tokens in the longest, N in all, U distinct words (padding is one), C characters.
    """
    documents: list
    lengths: list             # B sentence lengths
    tokens: torch.Tensor      # (B, T) index into `words`, not a vocabulary id; 0 is padding
    mask: torch.Tensor        # (B, T) True on tokens, False on padding
    words: torch.Tensor       # (U,) vocabulary ids of the distinct spellings, embedded once each
    chars: torch.Tensor       # (C + U + 1,) their characters, 0 before, between and after words
    n_chars: torch.Tensor     # (U,) how many characters each has
    contextual: torch.Tensor  # (L, N, F) contextual vectors, L layers of width F; empty if none

    def to(self, device):
        moved = {name: x.to(device) for name, x in vars(self).items() if torch.is_tensor(x)}
        return replace(self, **moved)

def make_batch(documents, vocabulary, contextual=None):
    """Documents -> `Batch`. contextual: used in place of the vocabulary's."""
    sentences = [words for d in documents for words in d.sentences if words]
    lengths = [len(words) for words in sentences]
    distinct = {"": 0}
    tokens = np.zeros((len(sentences), max(lengths)), dtype=np.int64)
    for row, words in zip(tokens, sentences):
        row[:len(words)] = [distinct.setdefault(word, len(distinct)) for word in words]
    ids = [vocabulary.word_ids.get(word.lower(), 1) for word in distinct]
    spellings = [vocabulary.spelling(word) for word in distinct]
    chars = [0, *chain.from_iterable(spellings)]
    n_chars = [len(spelling) - 1 for spelling in spellings]
    tokens = torch.from_numpy(tokens)
    return Batch(documents, lengths, tokens, tokens > 0, torch.tensor(ids), torch.tensor(chars),
                 torch.tensor(n_chars), (contextual or vocabulary.contextual)(sentences))

# ---------------------------------------------------------------------------------------- scores

class Scores:
    """Precision P, recall R and F1 = 2 P R / (P + R), in percent, of sums over documents.

    Every score has four numbers, [hits among predicted, predicted, hits among gold, gold], added up
    over documents before any division. The two hits differ only in `b_cubed`, below the banner.
    """

    def __init__(self, mean=None):
        """mean: the name of the mean of all F1, if it is a score of its own."""
        self.mean = mean
        self.sums = {}
        self.confusions = Counter()      # of (gold label, predicted label); None: no row

    def add(self, counts):
        """counts: {score name: four numbers}."""
        for name, numbers in counts.items():
            self.sums[name] = [a + b for a, b in zip(self.sums.get(name, [0] * 4), numbers)]

    def compute(self):
        """{name: F1, name-precision: P, name-recall: R} of what was added, with 0 / 0 = 0."""
        scores = {}
        for name, (hits, predicted, gold_hits, gold) in self.sums.items():
            precision = 100 * hits / (predicted or 1)
            recall = 100 * gold_hits / (gold or 1)
            scores[name] = 2 * precision * recall / (precision + recall or 1)
            scores[name + "-precision"] = precision
            scores[name + "-recall"] = recall
        if self.mean and scores:
            scores[self.mean] = sum(scores[name] for name in self.sums) / len(self.sums)
        return scores

def count_rows(predicted, gold):
    """The four numbers of spans with a label, or relations: a hit is exactly the same row."""
    predicted, gold = set(predicted), set(gold)
    hits = len(predicted & gold)
    return hits, len(predicted), hits, len(gold)

# ================================================================================================
# Skip this on a first reading: the practical side. Go on with hmtl.py.
# ================================================================================================

class InputError(Exception):
    """Bad input: one line that says where, what was expected and what was found."""

def expect(condition, where, expected, found):
    if not condition:
        plain = isinstance(found, str) and found.isprintable() and found.strip()
        found = found if plain else json.dumps(found)
        raise InputError(f"{where}: expected {expected}, found {found[:100]}")

@contextmanager
def one_line(message):
    """InputError instead of the many kinds of errors that damaged or foreign files raise."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        found = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        name = str(getattr(error, "filename", None) or "")     # such as one that features() lacks
        found = found if name in message else f"{found}: {name}"
        raise InputError(f"{message}: {' '.join(found.split())[:200]}") from None

def confusions(predicted, gold):
    """Counter of (gold label, predicted label) at every place that either has. A place is a row
    without its label; None stands for no row there."""
    hits = {*predicted} & {*gold}
    pairs = Counter((row[-1], row[-1]) for row in hits)
    missed, extra = sorted({*gold} - hits), sorted({*predicted} - hits)
    for place in dict.fromkeys(row[:-1] for row in missed + extra):
        here = [[row[-1] for row in rows if row[:-1] == place] for rows in (missed, extra)]
        pairs.update(zip_longest(*here))
    return pairs

def label_scores(pairs):
    """{label: its scores and counts}, the most frequent in gold first, from `confusions`."""
    gold = Counter(right for right, _ in pairs.elements())
    predicted = Counter(found for _, found in pairs.elements())
    rows = {}
    for label in sorted({*gold, *predicted} - {None}, key=lambda label: (-gold[label], label)):
        scores, hits = Scores(), pairs[label, label]
        scores.add({"f1": (hits, predicted[label], hits, gold[label])})
        rows[label] = {**scores.compute(), "predicted": predicted[label], "gold": gold[label]}
    return rows

def label_errors(pairs):
    """[((gold label, predicted label), number)] of those that differ, the most frequent first."""
    return [(pair, n) for pair, n in pairs.most_common() if pair[0] != pair[1]]

def overlaps(predicted, gold):
    """{(i, j): how many mentions predicted cluster i and gold cluster j share}, where they do."""
    of_predicted, of_gold = ({m: i for i, cluster in enumerate(clusters) for m in cluster}
                             for clusters in (predicted, gold))
    return Counter((i, of_gold[m]) for m, i in of_predicted.items() if m in of_gold)

def muc(predicted, gold):
    """Vilain et al. 1995: links, n - 1 in n mentions; hits are the links in what clusters share."""
    hits = sum(n - 1 for n in overlaps(predicted, gold).values())
    return hits, sum(len(c) - 1 for c in predicted), hits, sum(len(c) - 1 for c in gold)

def b_cubed(predicted, gold):
    """Bagga & Baldwin 1998: for every mention, how much of its cluster the other side has too."""
    shared = overlaps(predicted, gold).items()
    hits = sum(n * n / len(predicted[i]) for (i, _), n in shared)
    gold_hits = sum(n * n / len(gold[j]) for (_, j), n in shared)
    return hits, sum(map(len, predicted)), gold_hits, sum(map(len, gold))

def ceaf_e(predicted, gold):
    """Luo 2005: clusters matched one to one, to the largest sum of 2 |P & G| / (|P| + |G|)."""
    similarity = np.zeros((len(predicted), len(gold)))
    for (i, j), n in overlaps(predicted, gold).items():
        similarity[i, j] = 2 * n / (len(predicted[i]) + len(gold[j]))
    best = best_matching_sum(similarity)
    return best, len(predicted), best, len(gold)

def best_matching_sum(value):
    """The largest sum of entries of a matrix >= 0, at most one in a row and in a column: shortest
    paths with row and column potentials (Jonker & Volgenant 1987), O(n^3)."""
    value = value[value.any(1)][:, value.any(0)]   # the others match nothing, and may be many
    value = min(value, value.T, key=len)           # no more rows than columns
    n, m = value.shape
    cost = np.pad(-value, ((0, 0), (0, 1)))        # column m is where a new row starts
    row_of = np.full(m + 1, -1)                    # the row matched to each column
    v = np.zeros(m + 1)     # of columns; a matched row's u is cost - v there; cost - u - v >= 0
    for row in range(n):
        row_of[m], column, done = row, m, np.zeros(m + 1, dtype=bool)
        before, slack = np.full(m + 1, m), np.full(m + 1, np.inf)
        while row_of[column] >= 0:                 # grow shortest paths until a column is free
            done[column], slack[column], i = True, np.inf, row_of[column]
            reduced = np.where(done, np.inf, cost[i] - v - (cost[i, column] - v[column]))
            before[reduced < slack] = column
            slack = np.minimum(slack, reduced)
            column = slack.argmin()
            v[done] -= slack[column]
            slack -= slack[column]
        while column != m:                         # move the matches along the path
            row_of[column], column = row_of[before[column]], before[column]
    return float(sum(value[i, j] for j, i in enumerate(row_of[:m]) if i >= 0))

def cut_documents(documents, max_tokens):
    """Cuts between sentences: documents of max_tokens at most, or one sentence, and none empty."""
    parts, n_cut = [], 0
    for document in documents:
        groups = []                                # the indices of the sentences of every part
        starts = [*accumulate(map(len, document.sentences), initial=0)]
        for i in [i for i, words in enumerate(document.sentences) if words]:
            if not groups or starts[i + 1] - starts[groups[-1][0]] > max_tokens:
                groups.append([])
            groups[-1].append(i)
        parts += [part_of(document, kept, starts[kept[0]]) for kept in groups]
        n_cut += len(groups) > 1 and max_tokens > 1
    if n_cut:
        print(f"cut: {n_cut} training documents longer than --max-tokens {max_tokens}")
    return parts

def part_of(document, kept, start):
    """A document of the sentences with the indices `kept`, in which only empty ones are missing;
    the first begins at token `start`. A cluster of which the cut leaves one mention is dropped; one
    that had a single mention before stays."""
    part = Document(document.key, [document.sentences[i] for i in kept])
    end = start + len(part)
    for name, lists in document.annotations.items():
        if name == "clusters":
            cut = [[m for m in c if start <= m[0] and m[1] < end] for c in lists]
            lists = [c for c, whole in zip(cut, lists) if len(c) > 1 or len(c) == len(whole)]
        else:
            lists = [lists[i] for i in kept]
        n = 0 if name == "offsets" else -start
        part.annotations[name] = [[shifted(row, n) for row in rows] for rows in lists]
    return part

def shifted(row, n):
    return tuple(x if isinstance(x, str) else x + n for x in row)

def read_split(folder, split, task):
    documents = read_documents(file_of(folder, split), task)
    wanted = f"{split} documents with the key '{task.annotation}' for the task {task.name}"
    expect(documents, folder, wanted, "none")
    rows = chain.from_iterable(d.annotations[task.annotation] for d in documents)
    expect(split == "test" or any(rows), folder, wanted, "only empty ones")
    return documents

def file_of(folder, split):
    names = [split + suffix for suffix in (*JSON_SUFFIXES, ".conll", ".txt", ".bio")]
    found = [name for name in names if Path(folder, name).is_file()]
    expect(len(found) == 1, folder, "one file " + " or ".join(names),
           " and ".join(found) or ("none" if Path(folder).is_dir() else "no folder"))
    return Path(folder, found[0])

def read_documents(path, task):
    """The documents of a file that carry the task's annotation."""
    documents = read_annotated(path, "emd" if task.annotation == "emd" else "ner")
    return [d for d in documents if len(d) and task.annotation in d.annotations]

def read_annotated(path, annotation):
    """All documents of a file of JSON lines, or else of columns with tags of that annotation."""
    return read_json(path) if suffix_of(path) in JSON_SUFFIXES else read_columns(path, annotation)

def suffix_of(path):
    return Path(str(path).lower().removesuffix(".gz")).suffix

def read_lines(path):
    """The lines of a file, of a .gz file, or of standard input for `-`, one after the other."""
    opener = gzip.open if str(path).endswith(".gz") else open
    source = 0 if str(path) == "-" else path
    with one_line(f"{path}: expected a file of UTF-8 text"):
        with opener(source, "rt", encoding="utf-8-sig", newline="") as file:
            yield from file

def read_json(path):
    """Documents from JSON lines, the format of SciERC and DyGIE++. Errors name file and line."""
    return [parse_document(line, f"{path}, line {n}", f"{path}:{n}")
            for n, line in enumerate(read_lines(path), 1) if line.strip()]

def to_json(document):
    row = {"doc_key": document.key, "sentences": document.sentences, **document.annotations}
    return json.dumps(row, ensure_ascii=False)

def parse_document(line, where, key):
    """A Document from one line of JSON; `where` stands in errors, `key` is its default doc_key."""
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()           # an error if no file can hold it
    except (ValueError, RecursionError) as error:
        row = f"other text ({error})"
    expect(isinstance(row, dict), where, "one JSON object of valid characters a line", row)
    found = {t.annotation: row[t.annotation] for t in TASKS if row.get(t.annotation) is not None}
    document = Document(row.get("doc_key", key), row.get("sentences"), found)
    expect(isinstance(document.key, str), where, "a string as doc_key", document.key)
    for name, x in [("sentences", document.sentences), *found.items()]:
        lists = isinstance(x, list) and all(isinstance(y, list) for y in x)
        expect(lists, where, f"{name} as a list of lists", x)
    for x in chain(*document.sentences):
        expect(isinstance(x, str) and x.strip(), where, "every word to be a non-empty string", x)
    ends = np.cumsum([0, *map(len, document.sentences)]).tolist()
    for name, lists in found.items():
        here, types = f"{where}, {name}", ROW_TYPES.get(name, "int, int, str")
        limits = [(0, ends[-1])] * len(lists) if name == "clusters" else [*zip(ends, ends[1:])]
        expect(len(lists) == len(limits), here,
               f"one list for each of the {len(limits)} sentences", lists)
        for x, low, high in [(x, *limit) for rows, limit in zip(lists, limits) for x in rows]:
            shape = ", ".join(type(y).__name__ for y in x) if isinstance(x, list) else "no list"
            expect(shape == types and all(low <= a <= b < high for a, b in zip(x[::2], x[1::2])),
                   here, f"[{types}] with {low} <= start <= end < {high}", x)
            expect(str(x[-1]).strip(), here, "a label with characters", x)
        found[name] = [[*dict.fromkeys(map(tuple, rows))] for rows in lists]   # of `document` too
    clusters = found.get("clusters", [])
    expect(all(clusters), f"{where}, clusters", "clusters with spans, none empty", clusters)
    for span, n in Counter(chain(*clusters)).items():
        expect(n == 1, f"{where}, clusters", "every span in at most one cluster", span)
    return document

def read_columns(path, annotation):
    """Documents of one sentence from columns: word first, tag last, a blank line after each."""
    documents, words, tags = [], [], []
    for n, line in enumerate([*read_lines(path), ""], 1):
        line, where = line.strip(" \t\r\n"), f"{path}, line {n}"
        if line and not line.startswith("-DOCSTART-"):
            columns = re.split("\t+" if "\t" in line else " +", line)   # words hold others
            expect(len(columns) > 1 and columns[0].strip(), where, "a word and a tag", line)
            expect(re.fullmatch(r"O|[BIELSU]-.*\S.*", columns[-1]), where,
                   "a tag: O, or B-, I-, E-, L-, S- or U- and a label", columns[-1])
            words.append(columns[0])
            tags.append(columns[-1])
        elif words:
            spans = {annotation: [spans_of(tags)]}
            documents.append(Document(f"{path}:{n - len(words)}", [words], spans))
            words, tags = [], []
    return documents

def spans_of(tags):
    """[(start, end, label)] of BIO, BIOES or BIOUL tags; ill-formed ones as conlleval does."""
    spans = []
    for t, (left, right) in enumerate(zip(["O", *tags], tags)):
        goes_on = left[0] in "BI" and right[0] in "IEL" and left[2:] == right[2:]
        if right != "O":
            spans.append((spans.pop()[0] if goes_on else t, t, right[2:]))
    return spans

def tags_of(spans, length):
    """BIOUL tags: begin, inside, outside, unit, last. Of spans that overlap, the longest counts."""
    tags = ["O"] * length
    for start, end, label in sorted(spans, key=lambda s: (s[0] - s[1], s)):
        if {*tags[start:end + 1]} == {"O"}:
            prefixes = "U" if start == end else "B" + "I" * (end - start - 1) + "L"
            tags[start:end + 1] = [f"{prefix}-{label}" for prefix in prefixes]
    return tags

def may_follow(left, right):
    """Whether one BIOUL tag may come after another: an open span goes on, and nothing else does."""
    is_open, goes_on = left[0] in "BI", right[0] in "IL"
    return is_open == goes_on and (not is_open or left[2:] == right[2:])

def outermost(spans):
    """A non-overlapping subset: those that `tags_of` keeps."""
    return spans_of(tags_of(spans, 1 + max((end for _, end, _ in spans), default=0)))

def read_vectors(path):
    """(words, (N, E) float32 array) of a GloVe or word2vec text file: a word, then its numbers."""
    words, numbers, width = {}, array("f"), None          # numbers in place: the file may be large
    for n, line in enumerate(read_lines(path), 1):
        fields = [field for field in line.strip(" \t\r\n").replace("\t", " ").split(" ") if field]
        if not fields or n == 1 and len(fields) == 2:        # word2vec's first line is two counts
            continue
        width = width or len(fields) - 1
        word = " ".join(fields[:-width]).lower()             # it may hold a space
        try:
            vector = array("f", map(float, fields[-width:]))
            good = word and len(vector) == width and math.fsum(map(abs, vector)) < 1e30
        except (ValueError, OverflowError):
            good = False
        expect(good, f"{path}, line {n}", f"a word and {width or 'its'} numbers", line.strip())
        if words.setdefault(word, n) == n:                   # its first line
            numbers += vector
    expect(words, path, "a word and its numbers on every line", "none")
    return list(words), np.frombuffer(numbers, dtype=np.float32).reshape(len(words), width)

class ContextualVectors:
    """The (layers, words, width) arrays that the function `features` in a Python file of the user's
    returns for sentences, in half precision. Without a file, of 0 layers."""

    def __init__(self, path="", shape=(0, 0)):
        """shape: (layers, width), if a trained run says what they must be; else the first sentence
        tells. kept: {sentence: array} of the run, see `keep_features` in train.py."""
        self.path, self.shape, self.kept = path, shape, {}
        if path or any(shape):
            run = ", as the run's, of {} layers of width {}".format(*shape) if any(shape) else ""
            expect(Path(path).is_file(), "--features", f"a file{run}", path or "none")
            with one_line(f"{path}: expected Python code"), torch.no_grad():
                self.function = runpy.run_path(path).get("features")
            expect(callable(self.function), path, "a function features(sentences)", "none")

    def __call__(self, sentences):
        """(layers, words of all sentences, width); empty without a file."""
        if not self.path:
            return torch.zeros(0, 0, 0)
        keys = [tuple(words) for words in sentences]
        found = self.kept if self.kept.keys() >= {*keys} else self.compute(keys)
        return torch.cat([found[words] for words in keys], 1)

    def compute(self, sentences, show=lambda done: None):
        """{tuple of words: tensor}. The function gets 32 sentences of like lengths at a time."""
        where, found = f"{self.path}: features()", {}
        sentences = sorted({*sentences})
        for indices in by_length([len(words) for words in sentences], 32):
            show(len(found))
            asked = [sentences[i] for i in indices]
            with one_line(f"{where}: expected a list of arrays"), torch.no_grad():
                arrays = self.function([list(words) for words in asked])
                arrays = [torch.as_tensor(x).detach().cpu() for x in arrays]
            expect(len(arrays) == len(asked), where, f"{len(asked)} arrays", str(len(arrays)))
            for words, x in zip(asked, arrays):
                shape = tuple(x.shape)
                if not any(self.shape) and len(shape) == 3:
                    self.shape = shape[0], shape[2]
                wanted = self.shape[0] or "layers", len(words), self.shape[1] or "width"
                expect(x.is_floating_point() and shape == wanted, where,
                       "floats ({}, {} words, {})".format(*wanted), f"{x.dtype} {shape}")
                expect(x.half().isfinite().all(), where, "finite numbers up to 65504", "others")
                found[words] = x.half()
        return found

def by_length(lengths, size):
    """Lists of up to size indices, those of like lengths together."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return [order[i:i + size] for i in range(0, len(order), size)]

def read_text(path):
    """One document of raw text. "offsets" has every word's first character and the one after it."""
    text = "".join(read_lines(path))
    ends = {m.end() for m in SENTENCE_END.finditer(text) if m[1] and not m[1].islower()}
    cuts = [0, *sorted({*line_ends(text), *ends})]
    spans = [[m.span() for m in WORD.finditer(text, a, b)] for a, b in zip(cuts, cuts[1:])]
    spans = [sentence for sentence in spans if sentence]
    expect(spans, path, "some text", text)
    sentences = [[text[a:b] for a, b in sentence] for sentence in spans]
    return Document(Path(path).stem, sentences, {"offsets": spans})

def line_ends(text):
    """The offsets at which a line break ends a sentence: before an empty line, and before a capital
    letter if the line stands alone, as a headline does. Lines of 50 to 100 characters without room
    for the next word are taken for a paragraph's, in which a line break is a space."""
    end = 0
    for paragraph in re.split(r"(?<=\n)(?=[ \t\r]*\n)", text):
        lines = paragraph.splitlines(keepends=True)
        sizes = [len(line.rstrip()) for line in lines]
        longest = max(sizes, default=0)
        for line, size, after in zip(lines, sizes, [*lines[1:], ""]):
            end += len(line)
            capital = after.lstrip(" \t\"'([“‘")[:1].isupper()
            full = capital and 50 <= size <= 100 and size + len(after.split()[0]) >= longest
            if not after or capital and not full:
                yield end

def cut_sentences(document, where, longest=300):
    """The document with its sentences cut to `longest` words, as relations need memory for every
    pair of tokens. A cut document loses its annotations, so --columns has no gold for it."""
    if max(map(len, document.sentences), default=0) <= longest:
        return document
    print(f"{where}: cut: a sentence of more than {longest} words", file=sys.stderr)
    def pieces(rows):
        return [row[i:i + longest] for row in rows for i in range(0, len(row), longest)]
    kept = {k: pieces(rows) for k, rows in document.annotations.items() if k == "offsets"}
    return Document(document.key, pieces(document.sentences), kept)

def choose_tasks(names):
    """Fresh copies of the named tasks, without data, the simplest first."""
    return [replace(task) for task in TASKS if task.name in names]

def builtin_split(split, task):
    """The built-in documents: dev and test are the same for all tasks, train is the task's own."""
    expect(task.name in ("ner", "emd", "rel", "coref"), f"--data: {task.name}", "a folder",
           "none; the built-in corpus is for other tasks")
    size, seed = {"train": (task.builtin_size, [0, *task.name.encode()]),
                  "dev": (60, [1]), "test": (100, [2])}[split]
    return builtin_documents(size, np.random.default_rng(seed), f"{task.name}-{split}")

def builtin_documents(n, rng, name="news"):
    """n invented news documents, annotated for all four tasks, from a numpy random generator."""
    return [builtin_document(f"{name}-{i}", rng) for i in range(n)]

def builtin_document(key, rng):
    """Five sentences about three people, three organisations and three places."""
    def pick(options):
        return options[rng.integers(len(options))]
    cast = []
    for kind in ["PER"] * 3 + ["ORG"] * 3 + ["LOC"] * 3:
        name = ""
        while not name or [name] in [x["short"] for x in cast]:   # two of one name would be one
            name = pick(STEMS) + (pick(STEMS) if rng.random() < 0.5 else "") + pick(ENDINGS[kind])
            name = pick(AMBIGUOUS) if rng.random() < 0.15 else name.capitalize()
        gender = pick(["she", "he"]) if kind == "PER" else "it"
        first = [pick(FIRST_NAMES[gender])] if kind == "PER" else []
        last = [pick(["Group", "Holdings"])] if kind == "ORG" and rng.random() < 0.2 else []
        cast.append({"kind": kind, "full": [*first, name, *last], "short": [name], "mentions": [],
                     "gender": gender, "nominal": ["the", pick(NOUNS[kind].split())]})
    document, named = Document(key, [], {"ner": [], "emd": [], "relations": []}), []
    for n in range(5):                             # the last templates refer back
        template, relations = pick(TEMPLATES if n else TEMPLATES[:-6])
        template = re.sub(r"\(([^)]*)\)", lambda m: pick(m[1].split("|")), template)
        named = add_sentence(document, template.split(), relations, cast, named, rng)
    document.annotations["clusters"] = [x["mentions"] for x in cast if len(x["mentions"]) > 1]
    return document

def add_sentence(document, template, relations, cast, previous, rng):
    """Fills the template's slots and adds the sentence; returns the entities it names."""
    offset, words, spans, named = len(document), [], {}, []
    for symbol in template:
        form, kind = [symbol], KINDS.get(symbol.upper())
        if kind:
            free = [x for x in cast if x["kind"] == kind and x not in named]
            recent = [x for x in previous if x["kind"] == kind and symbol.islower()]
            who = free[rng.integers(len(free))]
            who = recent[0] if recent and recent[0] in free else who
            form = who["short"] if who["mentions"] else who["full"]
            if [x for x in recent if x["gender"] == who["gender"]] == [who] and rng.random() < 0.8:
                form = [who["gender"]]             # a nominal does not tell he from she
                form = who["nominal"] if recent == [who] and rng.random() < 0.4 else form
            start = offset + len(words)
            spans[symbol] = start, start + len(form) - 1
            who["mentions"].append(spans[symbol])
            named.append(who)
        words += form
    emd = [(*span, KINDS[symbol.upper()]) for symbol, span in spans.items()]
    ner = [row for row in emd if words[row[0] - offset].istitle()]      # only names are
    related = [(*spans[a], *spans[b], r) for a, r, b in re.findall(r"(\w) (\w+) (\w)", relations)]
    for key, rows in (("ner", ner), ("emd", emd), ("relations", related)):
        document.annotations[key].append(rows)
    document.sentences.append([words[0][0].upper() + words[0][1:], *words[1:]])
    return named

JSON_SUFFIXES = (".json", ".jsonl", ".jsonlines")
COREF_SCORES = {"muc": muc, "b_cubed": b_cubed, "ceaf_e": ceaf_e}
ROW_TYPES = {"relations": "int, int, int, int, str", "clusters": "int, int"}    # else int, int, str
# Raw text. After an abbreviation, an initial or "...", a sentence ends only before a STARTER.
ABBREVIATION = (r"(?:\b(?:Mr|Mrs|Ms|Messrs|Dr|Prof|St|Mt|Ft|Gen|Sen|Rep|Gov|Lt|Col|Capt|Sgt|Maj"
                r"|Adm|Cmdr|Rev|Hon|Atty|Jr|Sr|Inc|Co|Corp|Ltd|Plc|Bros|Ave|vs|etc"
                r"|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec|(?:No|[Pp]|Fig)(?=\.\s*\d)"
                r"|[A-Za-z]{1,2}(?:\.[A-Za-z])+|[A-Z](?=\.\s*\S))\.)")
STARTER = (r"(?:The|An?|This|That|These|Those|He|She|It|They|We|I|You|His|Her|Its|Their|Our|My|In"
           r"|On|At|By|From|For|With|As|After|Before|When|While|If|But|And|Or|So|There|However)\b")
WORD = re.compile(
    r"(?:https?://|www\.)\S*[\w/]|[\w.+-]{1,64}@[\w-]+(?:\.[\w-]+)+|" + ABBREVIATION
    + r"|[$€£]?\d+(?:[.,:/]\d+)*(?:%|\w*)(?:-\w+)*|[ODLdl]['’][A-Z]\w+(?:-\w+)*"
    r"|\w+(?=n['’]t\b)|n['’]t\b|['’](?:s|ll|re|ve|d|m)\b|\w+(?:[-&]\w+)*|\.{2,}|--+|\S")
# The first alternative passes over what ends no sentence; group 1 is the next's first character.
SENTENCE_END = re.compile(
    r"(?:" + ABBREVIATION + r"|\.{2,}|…)(?![.!?]|[\"')\]”’]*\s+[\"'(\[“‘]*" + STARTER + ")"
    r"|(?<![.!?…])[.!?…]+[\"')\]”’]*(?=\s+[\"'(\[“‘]*(\w))")
# The built-in corpus: invented news. A name is a stem and an ending. Most endings tell the type, so
# a new name can be classified; AMBIGUOUS names only by the sentence. "P of X" is a job if X is an
# organisation, a home if it is a place: the model must know the type, which a few relations cannot
# teach it. "P left O for N" relates P to N alone. Relations hold between names. Pronouns and
# nominals refer to the only entity of their type and gender in the sentence before.
STEMS = """ab al an ar bal bel ber bor bran cal car cor dal dan del dor dun el er fal fen for gal
 gar gor hal har hol il jan jor kal kel kir kor lam len lin lor mal mar mel mor nal nar nel nor ol
 or pal pel por ral ran rel ros sal sar sel sor tal tar tel tor ul val ver vil vor wal wen wil yar
 yor zal zen zor""".split()
ENDINGS = {"PER": """ez man son ova ski sen ini elli ard win wick smith field er ak uk ian oglu
            dottir strom quist berg eau off enko vic ert olf ano ides""".split(),
           "ORG": """ex tron soft corp tech dyne gen mart net bank air oil gas bus com pharm media
            chem sys link works line flex star data lab mobil nova tel um""".split(),
           "LOC": """ville stad burg ia ton ford mouth shire port land pool bury grad polis stan
            berg field hampton dale wood ham by heim hafen ica aria mere brook ora ino""".split()}
FIRST_NAMES = {"she": """Ada Anna Clara Dora Elena Emma Eva Fiona Greta Hanna Ida Ines Irene Julia
     Karen Laura Lena Lucy Maria Nina Nora Olga Paula Rita Rosa Sara Sofia Tina Vera Zoe""".split(),
               "he": """Adam Alan Boris Carl David Emil Eric Felix Frank George Hugo Igor Ivan Jack
     James Karl Leo Luis Mark Max Nick Oscar Otto Paul Peter Ralph Simon Tom Victor""".split()}
AMBIGUOUS = """Austin Benton Carson Chester Clinton Dayton Denver Florence Ford Georgia Hamilton
 Houston Jackson Jordan Lincoln Madison Marshall Milton Orlando Paris Preston Sidney Stanley
 Victoria Warwick""".split()
NOUNS = dict(PER="lawyer banker engineer politician", ORG="company firm group", LOC="city town")
KINDS = dict(zip("PQONLM", ["PER", "PER", "ORG", "ORG", "LOC", "LOC"]))
# Slots: P Q people, O N organisations, L M places, as names; p o l refer back. (a|b) is a choice.
TEMPLATES = [line.split("#") for line in """\
P (joined|was hired by|went to work for) O (last year|in June|on Monday) . # P Works_For O
P left O for N (last year|in June|on Monday) . # P Works_For N
P left L for M (last year|in June|on Monday) . # P Lives_In M
P of O (said|warned|denied) that (the deal|the plan|the sale) was (dead|near) . # P Works_For O
P of L (said|warned|denied) that (the deal|the plan|the sale) was (dead|near) . # P Lives_In L
P , (director|head|chairman) of O , (met|blamed|praised) Q of L . # P Works_For O ; Q Lives_In L
P , (a farmer|a painter) from L , (met|blamed|sued) Q of O . # P Lives_In L ; Q Works_For O
P (founded|started|set up) O with Q (last year|in June|in 1998) . # P Founded O ; Q Founded O
P , who (founded|started|set up) O , now works for N . # P Founded O ; P Works_For N
O , (founded|started|set up) by P , is leaving L for M . # P Founded O ; O Based_In M
O of L (hired|appointed) P (last year|in June|on Monday) . # O Based_In L ; P Works_For O
O , based in L , (bought|took over) N from P . # O Based_In L ; O Owns N
O was (bought|taken over) by N (last year|in June|on Monday) . # N Owns O
O (bought|took over) N despite (a protest|a lawsuit) by P . # O Owns N
P (grew up|lives|settled) in L and (met|blamed|sued) O . # P Lives_In L
P (met|blamed|sued|praised) O (last year|in June|on Monday) . #
P (met|blamed|sued|praised) Q in L . #
P (flew to|visited|drove to) L for talks with O . #
O (met|blamed|sued|praised) N over a (site|plant|shop) in L . #
O (opened|closed|sold) a (site|plant|shop) in L (last year|in June|on Monday) . #
P told Q that O might (open|close|sell) a (site|plant|shop) in L . #
p (said|warned|denied) that o would (grow|shrink|move) (this year|soon) . #
p (likes|knows|will visit) l (well|again) . #
p (met|blamed|sued|praised) Q on Tuesday . #
o (made|lost) (two|ten|forty) million in l . #
o (is looking for staff|has debts|had no comment) , P said . #
In l , p (had no comment|gave a speech|met reporters) . #""".splitlines()]
