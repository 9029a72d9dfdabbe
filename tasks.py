"""The four tasks: documents, batches, scores. Read this file first, then hmtl.py, then train.py.

Two sentences show all four tasks:

    [Ada Kell] works for [Nordex] .    [She] likes [the firm] .

    ner    named entities                         Ada Kell PER, Nordex ORG
    emd    entity mentions: names, pronouns,      Ada Kell PER, Nordex ORG, She PER, the firm ORG
           and phrases such as "the firm"
    rel    relations between entities             Ada Kell --Works_For--> Nordex
    coref  coreference: clusters of mentions      {Ada Kell, She}  {Nordex, the firm}

A `Document` holds sentences and their annotations. A `Task` knows which annotation it learns, and
draws batches of documents. `make_batch` turns documents into tensors. The scores equal those of
conlleval for spans, and of the CoNLL scorer for coreference. The code below the line "Skip this on
a first reading" reads files and vectors, and makes the built-in corpus.
"""

import json
import math
import re
import runpy
import sys
import traceback
import unicodedata
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, count
from pathlib import Path

import numpy as np
import torch

# ------------------------------------------------------------------------- documents and tasks
@dataclass
class Document:
    """Sentences and their annotations. Numbers count tokens from the start of the document."""
    # The example above is Document("news-1", [["Ada", "Kell", "works", "for", "Nordex", "."],
    #                                          ["She", "likes", "the", "firm", "."]],
    #     {"ner": [[(0, 1, "PER"), (4, 4, "ORG")], []],
    #      "emd": [[(0, 1, "PER"), (4, 4, "ORG")], [(6, 6, "PER"), (8, 9, "ORG")]],
    #      "relations": [[(0, 1, 4, 4, "Works_For")], []],
    #      "clusters": [[(0, 1), (6, 6)], [(4, 4), (8, 9)]]})
    #
    # A span is (start, end, label), where end is its last token. A relation is (start1, end1,
    # start2, end2, label). Each sentence has a list of spans and a list of relations. A cluster is
    # a list of mentions (start, end) from the whole document. If a key is missing, the document
    # is not annotated for it. If a list is empty, there is nothing to find.
    key: str
    sentences: list                             # a list of words for every sentence
    annotations: dict = field(default_factory=dict)
    offsets: list = None    # of raw text: for each sentence, (start, end) of its words

    def __post_init__(self):
        if str in map(type, self.sentences):
            raise TypeError("a sentence is a list of words, not a string; "
                            "tasks.parse_text(text) makes a Document of raw text")

    def __len__(self):
        return sum(map(len, self.sentences))

def sentences_of(document):
    """Every sentence that has words, as a document of its own, without clusters."""
    # The second sentence above becomes Document("news-1", [["She", "likes", "the", "firm", "."]],
    #     {"ner": [[]], "emd": [[(0, 0, "PER"), (2, 3, "ORG")]], "relations": [[]]}).
    sentences, start = [], 0
    for i, words in enumerate(document.sentences):
        sentence = Document(document.key, [words])
        for name, lists in document.annotations.items():
            if name != "clusters":
                sentence.annotations[name] = [shifted(lists[i], -start)]
        if words:
            sentences.append(sentence)
        start += len(words)
    return sentences

def shifted(rows, n):
    """The same spans or relations, with n added to every token number."""
    return [tuple(x if isinstance(x, str) else x + n for x in row) for row in rows]

@dataclass
class Task:
    """One task: what it learns, and its documents. Most tasks read single sentences, each of
    them a document of its own. Coreference reads `whole_documents`, one at a time."""
    name: str
    annotation: str                          # its key in Document.annotations
    validation_metric_name: str              # the dev score that decides which epoch is the best
    validation_metric_decreases: bool = False
    whole_documents: bool = False
    builtin_size: int = 60                   # training documents in the built-in corpus
    data: dict = field(default_factory=dict, init=False)   # "train", "dev", "test" -> documents

    def load_data(self, folder=None, max_tokens=math.inf, keys=None):
        """Reads train, dev and test from a folder, or takes the built-in corpus. Documents
        without the task's annotation are left out. Coreference cuts training documents of more
        than max_tokens. keys: read only these annotations (default: those of all tasks)."""
        for split in ("train", "dev", "test"):
            documents = load_split(folder, split, self, keys)
            longest = max_tokens if split == "train" else math.inf
            self.data[split] = self.examples(documents, longest)

    def examples(self, documents, max_tokens=math.inf):
        """All that the task reads: single sentences, or documents of at most max_tokens."""
        if self.whole_documents:
            return cut_documents(documents, max_tokens)
        return [sentence for document in documents for sentence in sentences_of(document)]

    def labels(self, split="train"):
        """The labels in a split, sorted. Clusters have none."""
        if self.whole_documents:
            return []
        labels = set()
        for document in self.data[split]:
            for *_, label in document.annotations[self.annotation][0]:   # its only sentence
                labels.add(label)
        return sorted(labels)

    def documents_per_batch(self, batch_size):
        """batch_size sentences, or one whole document."""
        return 1 if self.whole_documents else batch_size

    def n_batches(self, batch_size):
        """How many training batches one pass over the data has."""
        return math.ceil(len(self.data["train"]) / self.documents_per_batch(batch_size))

    def batches(self, batch_size, seed, start=0):
        """Yields training batches (lists of documents) without end, from batch `start` on."""
        # Every pass over the data has its own random generator, seeded with (seed, task, number
        # of the pass). So a resumed run only needs to know how many batches it has drawn already.
        documents = self.data["train"]
        lengths = list(map(len, documents))
        first_pass, skip = divmod(start, self.n_batches(batch_size))
        for n_pass in count(first_pass):
            rng = np.random.default_rng([seed, *self.name.encode(), n_pass])
            plan = plan_batches(lengths, self.documents_per_batch(batch_size), rng)
            for indices in plan[skip:]:
                yield [documents[i] for i in indices]
            skip = 0

def plan_batches(lengths, size, rng):
    """An array of document numbers for every batch, in random order."""
    # Sentences of similar length share a batch, because padding costs time. Noise on the lengths
    # makes the batches of every pass different.
    noisy = np.array(lengths) * rng.uniform(0.9, 1.1, len(lengths))
    order = np.argsort(noisy)
    batches = np.split(order, range(size, len(order), size))    # cut after every `size`
    rng.shuffle(batches)
    return batches

TASKS = [                                 # the simple tasks first, as in the hierarchy
    Task(name="ner", annotation="ner", validation_metric_name="f1", builtin_size=300),
    Task(name="emd", annotation="emd", validation_metric_name="f1", builtin_size=200),
    Task(name="rel", annotation="relations", validation_metric_name="last-token"),
    Task(name="coref", annotation="clusters", validation_metric_name="mean",
         whole_documents=True, builtin_size=120)]

# --------------------------------------------------------------------------------------- batches
MAX_CHARS = 40                 # the char CNN reads only the beginning of longer words

class Vocabulary:
    """The words (lower-cased) and characters that the model knows, with their ids."""
    # words   "" for padding (id 0), <unknown> (id 1), the words of the training documents, and then
    #         those that only a file of word vectors has
    # counts  counts[i] is the number of training documents that contain word i. A word with a small
    #         count is rare: in training it is sometimes read as <unknown> (`Embedder` in hmtl.py).
    #         Words that only the vector file has get no counts.
    # chars   "", <unknown>, and the characters of the training documents

    def __init__(self, words, chars, counts, vector_words=()):
        self.words = [*words, *vector_words]
        self.chars = chars
        self.counts = counts
        self.word_ids = dict(zip(self.words, count()))
        self.char_ids = dict(zip(self.chars, count()))

    @classmethod
    def from_documents(cls, documents, vector_words=()):
        # Count documents, not tokens: a name that only one document uses, even ten times, is rare.
        # Sentences that were cut from the same document share its key.
        words_of = defaultdict(set)             # {document key: its distinct words}
        for document in documents:
            for sentence in document.sentences:
                words_of[document.key].update(map(lookup_form, sentence))
        counts = Counter()
        chars = set()
        for distinct in words_of.values():
            counts.update(set(map(str.lower, distinct)))
            chars.update("".join(distinct))
        # The most frequent words come first. Padding and <unknown> are never rare.
        words = sorted(counts, key=lambda word: (-counts[word], word))
        all_counts = [math.inf, math.inf, *map(counts.get, words)]
        more = [word for word in vector_words if word not in counts]
        special = ["", "<unknown>"]
        return cls(special + words, special + sorted(chars), all_counts, more)

def lookup_form(word):
    """Writes accented letters as one character each (NFC), and drops invisible characters (Cf).
    So every way to encode "Zürich" gives the same word. Capitals stay."""
    if word.isascii():
        return word
    visible = [char for char in word if unicodedata.category(char) != "Cf"]
    return unicodedata.normalize("NFC", "".join(visible)) or word

@dataclass
class Batch:
    """Documents as tensors, with a row for each sentence that has words."""
    # Each distinct word is embedded once; which_word then copies its vector to all its places.
    #     B   sentences in the batch        U   distinct words in the batch, counting padding
    #     T   tokens in the longest one     C   characters of all distinct words together
    documents: list
    sentences: list              # the B lists of words
    lengths: list                # their numbers of tokens
    mask: torch.Tensor           # (B, T) True on tokens, False on padding
    which_word: torch.Tensor     # (B, T) which of the U distinct words each token is
    word_ids: torch.Tensor       # (U,) the ids of the distinct words in the vocabulary
    chars: torch.Tensor          # (C + U + 1,) their characters, 0 before and after each word
    word_of_char: torch.Tensor   # (C,) which of the U words each character belongs to

    def to(self, device):
        moved = {name: x.to(device) for name, x in vars(self).items() if torch.is_tensor(x)}
        return replace(self, **moved)

def make_batch(documents, vocabulary):
    """Documents -> `Batch`."""
    sentences = [words for document in documents for words in document.sentences if words]
    lengths = list(map(len, sentences))
    # Number the distinct words in the order in which they appear. Number 0 is the padding word "".
    number_of = {"": 0}
    which_word = np.zeros((len(sentences), max(lengths)), dtype=np.int64)
    for row, words in zip(which_word, sentences):
        row[:len(words)] = [number_of.setdefault(word, len(number_of)) for word in words]
    # Look them up. All characters lie in one row: "Ada Kell" is 0 0 A d a 0 K e l l 0. Nothing is
    # between the first two zeros, because the padding word has no characters.
    word_ids, chars, word_of_char = [], [0], []
    for word, number in number_of.items():
        word = lookup_form(word)
        spelling = [vocabulary.char_ids.get(char, 1) for char in word[:MAX_CHARS]]
        word_ids.append(vocabulary.word_ids.get(word.lower(), 1))
        chars += [*spelling, 0]
        word_of_char += [number] * len(spelling)

    which_word = torch.from_numpy(which_word)
    return Batch(documents=documents, sentences=sentences, lengths=lengths, mask=which_word > 0,
                 which_word=which_word, word_ids=torch.tensor(word_ids),
                 chars=torch.tensor(chars), word_of_char=torch.tensor(word_of_char))

# -------------------------------------------------------------------------------- spans and tags
# BIOUL tags write the spans of a sentence as one tag for every token: Begin, Inside and Last for a
# longer span, Unit for a span of one token, and O outside of all spans.
def tags_of(spans, length):
    """The BIOUL tags of a sentence. Of spans that overlap, the longest is kept.

    >>> tags_of([(0, 1, "PER"), (4, 4, "ORG")], 6)
    ['B-PER', 'L-PER', 'O', 'O', 'U-ORG', 'O']
    """
    tags = ["O"] * length
    longest_first = sorted(spans, key=lambda span: (span[0] - span[1], span))
    for start, end, label in longest_first:
        if set(tags[start:end + 1]) == {"O"}:
            prefixes = "U" if start == end else "B" + "I" * (end - start - 1) + "L"
            tags[start:end + 1] = [f"{prefix}-{label}" for prefix in prefixes]
    return tags

def spans_of(tags):
    """The spans of a sentence from BIOUL tags, or from BIO or BIOES tags (E means L, S means U).

    >>> spans_of(["B-PER", "L-PER", "O", "O", "U-ORG", "O"])
    [(0, 1, 'PER'), (4, 4, 'ORG')]
    """
    spans, previous = [], "O"
    for t, tag in enumerate(tags):
        # As in conlleval, an I that continues no span begins one.
        if previous[0] in "BI" and tag[0] in "IEL" and previous[2:] == tag[2:]:
            spans[-1] = (spans[-1][0], t, tag[2:])
        elif tag != "O":
            spans.append((t, t, tag[2:]))
        previous = tag
    return spans

def may_follow(left, right):
    """Whether tag `right` may follow tag `left`. After B or I, the next tag must be I or L of the
    same label. After any other tag, it must not be I or L."""
    is_open, goes_on = left[0] in "BI", right[0] in "IL"
    return is_open == goes_on and (not is_open or left[2:] == right[2:])

# ---------------------------------------------------------------------------------------- scores
class Scores:
    """Precision, recall and F1 in percent, over many documents."""
    # Four counts are added up over all documents before any division.
    #     right       predictions that are right             precision P = right / predicted
    #     predicted   all predictions
    #     found       gold items that are found              recall R = found / gold
    #     gold        all gold items, such as spans
    # F1 is 2 P R / (P + R); 0 / 0 counts as 0. Only in B-cubed do right and found differ.

    def __init__(self, mean=None):
        """mean: the name of one more score, the mean of all F1. None: there is no such score."""
        self.mean = mean
        self.counts = {}

    def add(self, counts):
        """counts: {score name: (right, predicted, found, gold)} of one document."""
        for name, four in counts.items():
            before = self.counts.get(name, (0, 0, 0, 0))
            self.counts[name] = tuple(a + b for a, b in zip(before, four))

    def compute(self):
        """{name: F1, name-precision: P, name-recall: R}, for every score."""
        scores, total = {}, 0.0
        for name, (right, predicted, found, gold) in self.counts.items():
            precision = 100 * right / (predicted or 1)
            recall = 100 * found / (gold or 1)
            f1 = 2 * precision * recall / (precision + recall or 1)
            scores |= {name: f1, f"{name}-precision": precision, f"{name}-recall": recall}
            total += f1
        if self.mean and scores:
            scores[self.mean] = total / len(self.counts)
        return scores

def count_rows(predicted, gold):
    """The four counts of spans or relations: a prediction is right if it equals a gold one."""
    predicted, gold = set(predicted), set(gold)
    n_right = len(predicted & gold)
    return n_right, len(predicted), n_right, len(gold)

def count_labels(name, predicted, gold):
    """For the name "f1": {"f1": counts of all rows, "f1 PER": of the rows with label PER, ...}."""
    counts = {name: count_rows(predicted, gold)}
    for label in sorted({row[-1] for row in [*predicted, *gold]}):
        rows = [[row for row in side if row[-1] == label] for side in (predicted, gold)]
        counts[f"{name} {label}"] = count_rows(*rows)
    return counts

def count_relations(pairs, gold, spans=None, gold_spans=None):
    """The counts of three scores of relations. pairs: predicted (last token, last token,
    label). gold: relations. spans: predicted by a tagger. gold_spans: the annotated ones."""
    # last-token (the paper's score): the label and each argument's last token must be right.
    gold_pairs = [(end1, end2, label) for _, end1, _, end2, label in gold]
    counts = count_labels("last-token", pairs, gold_pairs)
    # boundaries: the label and the spans of both arguments. strict: also their types.
    if spans is not None:
        relations = with_spans(pairs, spans)
        counts["boundaries"] = count_rows(relations, gold)
        if gold_spans is not None:
            counts["strict"] = count_rows(with_types(relations, spans),
                                          with_types(gold, gold_spans))
    return counts

def with_spans(pairs, spans):
    """Relations between the spans that end at the tokens of the pairs, if there are such spans."""
    relations = []
    start_of = {end: start for start, end, _ in spans}
    for end1, end2, label in pairs:
        if end1 in start_of and end2 in start_of:
            relations.append((start_of[end1], end1, start_of[end2], end2, label))
    return relations

def with_types(relations, spans):
    """Relations with the labels of both arguments; None where there is no such span."""
    type_of = {(start, end): label for start, end, label in spans}
    return [(*row, type_of.get(row[:2]), type_of.get(row[2:4])) for row in relations]

# Coreference. In the examples each letter is a mention. The predicted clusters are ab, cd and fghi,
# the gold clusters abc and defg (Pradhan et al. 2014, section 4). They share ab, c, d and fg.

def overlaps(predicted, gold):
    """{(i, j): the number of mentions that predicted cluster i and gold cluster j share}."""
    gold_of = {mention: j for j, cluster in enumerate(gold) for mention in cluster}
    shared = Counter()
    for i, cluster in enumerate(predicted):
        shared.update((i, gold_of[mention]) for mention in cluster if mention in gold_of)
    return shared

def muc(predicted, gold):
    """MUC (Vilain et al. 1995) counts links. A cluster of n mentions has n - 1 links."""
    # A shared part of n mentions has n - 1 right links: ab and fg have 1 each, c and d none. There
    # are 1 + 1 + 3 predicted and 2 + 3 gold links.
    shared = overlaps(predicted, gold)
    n_right = sum(shared.values()) - len(shared)
    n_predicted = sum(map(len, predicted)) - len(predicted)
    n_gold = sum(map(len, gold)) - len(gold)
    return n_right, n_predicted, n_right, n_gold

def b_cubed(predicted, gold):
    """B-cubed (Bagga & Baldwin 1998) counts mentions. A mention is right to the degree that its
    predicted cluster lies in its gold cluster, and found to the degree that the reverse holds."""
    # Example: a and b count 2/2 each, c and d 1/2, f and g 2/4. So 4 of 8 mentions are right.
    right = found = 0.0
    for (i, j), n in overlaps(predicted, gold).items():
        right += n * n / len(predicted[i])
        found += n * n / len(gold[j])
    return right, sum(map(len, predicted)), found, sum(map(len, gold))

def ceaf_e(predicted, gold):
    """CEAF-e (Luo 2005) matches predicted clusters P and gold clusters G one to one, so that
    the sum of 2 |P & G| / (|P| + |G|) is as large as possible."""
    # Example: ab with abc gives 4/5, fghi with defg 4/8: 1.3 of 3 predicted, of 2 gold clusters.
    similarity = np.zeros((len(predicted), len(gold)))
    for (i, j), n in overlaps(predicted, gold).items():
        similarity[i, j] = 2 * n / (len(predicted[i]) + len(gold[j]))
    best = best_matching_sum(similarity)            # the assignment problem, see below
    return best, len(predicted), best, len(gold)

COREF_SCORES = {"muc": muc, "b_cubed": b_cubed, "ceaf_e": ceaf_e}

# ================================================================================================
# Skip this on a first reading: files, raw text, vectors, the built-in corpus. Go on with hmtl.py.
# ================================================================================================

class InputError(Exception):
    """What a user can mend, in one line: where, what was expected, what was found."""

def expect(condition, where, expected, found):
    """Raises an InputError unless the condition holds."""
    if not condition:
        plain = isinstance(found, str) and found.isprintable() and found.strip()
        found = found if plain else json.dumps(found)
        raise InputError(f"{where}: expected {expected}, found {found[:100]}")

@contextmanager
def one_line(message, script=None):
    """InputError instead of the many kinds of errors that damaged or foreign files raise. For an
    error in the user's script, its line there stands in the place of the message."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
        if isinstance(error, OSError) and not script:
            found = error.strerror or found                # the message names the file already
        for frame in traceback.extract_tb(error.__traceback__):
            message = f"{script}, line {frame.lineno}" if frame.filename == script else message
        raise InputError(f"{message}: {' '.join(found.split())[:300]}") from None

def choose_tasks(names):
    """Fresh copies of the named tasks, without data, the simplest first."""
    return [replace(task) for task in TASKS if task.name in names]

def per_task(items, names, flag):
    """{task: value}, from VALUE for all tasks and TASK=VALUE for one: ["1x200", "rel=3x64"]."""
    values = {}
    for item in items:
        name, value = item.split("=", 1) if "=" in item else ("", item)
        expect(name in ["", *names], flag, f"one of the tasks {', '.join(names)}", name)
        expect(name not in values, flag, f"one value for {name or 'all tasks'}", value)
        values[name] = value
    for name in names:
        expect(name in values or "" in values, flag, f"a value for the task {name}", "none")
    return {name: values[name if name in values else ""] for name in names}

# Files of documents.
JSON_SUFFIXES = (".json", ".jsonl", ".jsonlines")
LONGEST = 300     # words in a sentence: relations need time and memory for every pair of its words

def load_split(folder, split, task, keys=None):
    """The documents of a split that carry the task's annotation, from a folder or built in."""
    if not folder:
        builtin = task.name in ("ner", "emd", "rel", "coref")
        expect(builtin, f"--data: {task.name}", "a folder", "none; the built-in corpus lacks it")
        own = task.builtin_size, [0, *task.name.encode()]        # all tasks share dev and test
        size, seed = {"train": own, "dev": (60, [1]), "test": (100, [2])}[split]
        return builtin_documents(size, np.random.default_rng(seed), f"{task.name}-{split}")
    documents = read_documents(file_of(folder, split), task, keys)
    wanted = f"{split} documents with the key '{task.annotation}' for the task {task.name}"
    expect(documents, folder, wanted, "none")
    used = any(rows for d in documents for rows in d.annotations[task.annotation])
    expect(split == "test" or used, folder, wanted, "only empty ones")
    return documents

def file_of(folder, split):
    names = [split + suffix for suffix in (*JSON_SUFFIXES, ".conll", ".txt", ".bio")]
    found = [name for name in names if Path(folder, name).is_file()]
    expect(len(found) == 1, folder, "one file " + " or ".join(names),
           " and ".join(found) or ("none" if Path(folder).is_dir() else "no folder"))
    return Path(folder, found[0])

def read_documents(path, task, keys=None):
    """The documents of a file that carry the task's annotation."""
    documents = read_annotated(path, "emd" if task.annotation == "emd" else "ner", keys)
    documents = [d for d in documents if len(d) and task.annotation in d.annotations]
    for document in documents if task.annotation == "relations" else []:
        for n, words in enumerate(document.sentences, 1):
            expect(len(words) <= LONGEST, f"{path}, {document.key}, sentence {n}",
                   f"at most {LONGEST} words in a sentence for rel", str(len(words)))
    return documents

def read_annotated(path, tagged, keys=None):
    """All documents of a file of JSON lines, or else of columns with tags of the key `tagged`."""
    return read_json(path, keys) if suffix_of(path) in JSON_SUFFIXES else read_columns(path, tagged)

def suffix_of(path):
    return Path(path).suffix.lower()

def read_lines(path):
    """The lines of a file, or of standard input for `-`, one after the other."""
    source = 0 if str(path) == "-" else path                      # 0 is standard input
    with one_line(f"{path}: expected a file of UTF-8 text"):
        with open(source, encoding="utf-8-sig", newline="") as file:
            yield from file

def stripped_lines(path):
    """(line number, line), without blanks and byte order marks around the line."""
    return ((n, line.strip("\ufeff \t\r\n")) for n, line in enumerate(read_lines(path), 1))

def read_json(path, keys=None):
    """Documents from JSON lines, as of SciERC and DyGIE++. Only `keys` are read, else all."""
    documents, wanted = [], "one JSON object of valid characters a line"
    for n, line in filter(lambda row: row[1], stripped_lines(path)):
        where = f"{path}, line {n}"
        with one_line(f"{where}: expected {wanted}"):
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()       # an error if no file can hold it
        expect(isinstance(row, dict), where, wanted, row)
        sentences, key = row.get("sentences"), row.get("doc_key")
        good = is_list(sentences, list) and all(is_list(words, str) for words in sentences)
        expect(good, where, "sentences as lists of words", sentences)
        good = all(map(str.strip, chain(*sentences)))
        expect(good, where, "words with characters", "a blank one")
        document = Document(f"{path}:{n}" if key is None else str(key), sentences)
        for key in [task.annotation for task in TASKS] if keys is None else keys:
            if row.get(key) is not None:
                document.annotations[key] = parse_rows(row[key], key, document, f"{where}, {key}")
        documents.append(document)
    return documents

def to_json(document):
    row = {"doc_key": document.key, "sentences": document.sentences, **document.annotations}
    return json.dumps(row | ({"offsets": document.offsets} if document.offsets else {}),
                      ensure_ascii=False)

def is_list(value, kind):
    """Whether a value from JSON is a list with entries of one type."""
    return type(value) is list and all(type(x) is kind for x in value)

def parse_rows(value, key, document, where):
    """The clusters, or a list of rows for each sentence; one flat list is sorted into sentences."""
    n, clusters = len(document.sentences), key == "clusters"
    form = {"clusters": [int, int], "relations": [int] * 4 + [str]}.get(key, [int, int, str])
    types = ", ".join(kind.__name__ for kind in form)
    ends = np.cumsum([0, *map(len, document.sentences)]).tolist()
    flat = is_list(value, list) and all([*map(type, row)] == form for row in value)
    if n and not clusters and flat:
        rows, value = value, [[] for _ in range(n)]
        for row in rows:
            value[sum(end <= row[0] for end in ends[1:-1])].append(row)
    wanted = "lists of [start, end]" if clusters else f"one list for each of the {n} sentences"
    expect(is_list(value, list) and (clusters or len(value) == n), where, wanted, value)
    bounds = [(0, ends[-1])] * len(value) if clusters else zip(ends, ends[1:])
    for rows, (low, high) in zip(value, bounds):
        wanted = f"[{types}] with {low} <= start <= end < {high}{' and a label' * (not clusters)}"
        for row in rows:
            good = type(row) is list and [*map(type, row)] == form and str(row[-1]).strip()
            good = good and all(low <= a <= b < high for a, b in zip(row[::2], row[1::2]))
            expect(good, where, wanted, row)
    lists = [[*dict.fromkeys(map(tuple, rows))] for rows in value]     # each row once
    if clusters:
        span, times = max(Counter(chain(*lists)).items(), key=lambda item: item[1], default=(0, 1))
        expect(times == 1, where, "every span in at most one cluster", span)
    return [rows for rows in lists if rows or not clusters]

def read_columns(path, annotation):
    """Documents of one sentence from columns: word first, tag last, a blank line after each."""
    documents, words, tags = [], [], []
    for n, line in chain(stripped_lines(path), [(0, "")]):
        where = f"{path}, line {n}"
        if line and not line.startswith("-DOCSTART-"):
            columns = re.split("\t+" if "\t" in line else " +", line)     # a word may hold others
            word, tag = columns[0].strip(), columns[-1].strip()
            expect(len(columns) > 1 and word, where, "a word and a tag", line)
            expect(re.fullmatch(r"O|[BIELSU]-.*\S.*", tag), where, "a tag such as O or B-PER", tag)
            expect(len(words) < 1000, where, "an empty line after a sentence", "1,001 words")
            words.append(word)
            tags.append(tag)
        elif words:
            spans = {annotation: [spans_of(tags)]}
            documents.append(Document(f"{path}:{len(documents) + 1}", [words], spans))
            words, tags = [], []
    return documents

def cut_documents(documents, max_tokens):
    """Cuts documents of more than max_tokens between sentences, and drops those without a word. A
    cluster loses its mentions in the other part, and is dropped if that leaves only one."""
    parts, n_cut = [], 0
    for document in documents:
        pieces, start = [], 0
        for words in document.sentences:
            if not pieces or len(pieces[-1]) + len(words) > max_tokens:
                pieces.append(Document(document.key, [], {"clusters": []}))
            pieces[-1].sentences.append(words)
        for piece in pieces:
            for cluster in document.annotations["clusters"]:
                inside = [m for m in cluster if start <= m[0] and m[1] < start + len(piece)]
                if len(inside) > 1 or len(inside) == len(cluster):
                    piece.annotations["clusters"].append(shifted(inside, -start))
            start += len(piece)
        n_cut += len(pieces) > 1
        parts += pieces if len(pieces) > 1 else [document]
    if n_cut:
        print(f"cut: {n_cut} training documents longer than --max-tokens {max_tokens}")
    return [part for part in parts if len(part)]

# Raw text. The dot of an abbreviation belongs to its word. After an abbreviation, an initial or
# "...", a sentence ends only before a STARTER such as "The"; after NEVER_LAST it does not end.
NEVER_LAST = re.compile(r"(?:al|Figs?|Eqs?|Sec|Tab|Ref|[Vv]ol|pp|ca|approx|Dept|Univ|Pres)\.")
ABBREVIATION = (
    r"\b(?:(?:\w+-)?(?:Mr|Mrs|Ms|Messrs|Dr|Prof|St|Mt|Ft|Gen|Sen|Rep|Gov|Lt|Col|Capt|Sgt|Maj|Adm"
    r"|Cmdr|Rev|Hon|Atty|Jr|Sr|Inc|Co|Corp|Ltd|Plc|Bros|Ave|vs|etc|Jan|Feb|Mar|Apr|Jun|Jul|Aug"
    r"|Sept?|Oct|Nov|Dec)|(?:No|[Pp])(?=\.[^\S\n]*(?:\n[^\S\n]*)?\d)|[A-Za-z]{1,2}(?:\.[A-Za-z])+"
    r"|[A-Z](?=\.[^\S\n]*(?:\n[^\S\n]*)?\S))\.|\b(?<!\w\.)" + NEVER_LAST.pattern)
STARTER = re.compile(
    r"[\"'(\[“‘]*(?:[¿¡]|(?:The|An?|This|That|These|Those|He|She|It|They|We|I|You|His|Her|Its"
    r"|Their|Our|My|In|On|At|By|From|For|With|As|After|Before|When|While|If|But|And|Or|So|There"
    r"|However)\b)")
WORD = re.compile(
    r"(?:https?://|www\.)\S*[\w/]|[\w.+-]{1,64}@[\w-]+(?:\.[\w-]+)+|" + ABBREVIATION
    + r"|[$€£]?\d+(?:[.,:/]\d+)*(?:%|\w*)(?:-\w+)*|[ODLdl]['’][A-Z]\w+(?:-\w+)*"
    r"|\w+(?=n['’]t\b)|n['’]t\b|['’](?:s|ll|re|ve|d|m)\b|\w+(?:[-&]\w+)*|\.{2,}|--+|\S")
EMPTY_LINE = re.compile(r"\n[ \t\r]*\n")
LIST_ITEM = re.compile(r"(?:[-*•]|\d{1,3}[.)]|[A-Za-z]\))[ \t]+(?=\S)")
BEGINNING = re.compile(r"[\"'(\[“‘«$€£]*(?:[¿¡]|(\w))")        # group 1: the first letter or digit
UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3001-\u30ff\u3400-\u9fff]")

def parse_text(text, key="text"):
    """A Document of raw text, with the offsets of its words."""
    # Accents and invisible characters belong to the word before them: the search does not see
    # them, and a word goes on to the next other character.
    kept = [i for i, char in enumerate(text)
            if char.isascii() or unicodedata.category(char) not in ("Mn", "Mc", "Me", "Cf")]
    plain = "".join(text[i] for i in kept)
    kept.append(len(text))
    offsets, last, end, marker_end = [], "", 0, 0    # last: the last word but closing quotes
    for match in WORD.finditer(plain):
        start, gap, first = match.start(), plain[end:match.start()], not offsets
        item = LIST_ITEM.match(plain, start) if first or "\n" in gap else None
        marker_end = item.end() if item else marker_end      # no sentence ends after "1." itself
        if last == "…" or last.endswith(".") and len(last) > 1:        # an abbreviation, or "..."
            ends = not NEVER_LAST.fullmatch(last) and STARTER.match(plain, start)
        else:
            following = BEGINNING.match(plain, start) if last in (".", "!", "?") else None
            ends = following and not (following[1] or "").islower()
        ends = ends and gap and start > marker_end
        if first or item or ends or EMPTY_LINE.search(gap):
            offsets.append([])
        end = match.end()
        offsets[-1].append((kept[start], kept[end]))
        if gap or match[0] not in "\"')]”’»":
            last = match[0]
    return Document(key, [[text[a:b] for a, b in row] for row in offsets], offsets=offsets)

def read_text(path):
    """A Document of a file of raw text."""
    text = "".join(read_lines(path))
    document = parse_text(text, Path(path).stem)
    expect(document.sentences, path, "some text", text)
    tagged = re.findall(r"^\S.*[ \t](?:O|[BIELSU]-\S+)[ \t\r]*$", text, re.M)
    if 2 * len(tagged) > len(re.findall(r"^.*\S", text, re.M)):
        print(f"{path}: looks like columns; name it .conll to have it so read", file=sys.stderr)
    if 2 * len(UNSPACED.findall(text)) > sum(map(str.isalpha, text)):
        print(f"{path}: text without spaces must be split into words first", file=sys.stderr)
    return document

def cut_sentences(document, where):
    """The document without annotations, and with its sentences cut to LONGEST words."""
    if max(map(len, document.sentences), default=0) > LONGEST:
        print(f"{where}: cut: a sentence of more than {LONGEST} words", file=sys.stderr)
    def pieces(lists):
        return [row[i:i + LONGEST] for row in lists for i in range(0, max(1, len(row)), LONGEST)]
    offsets = document.offsets and pieces(document.offsets)
    return Document(document.key, pieces(document.sentences), offsets=offsets)

# Vectors.
def read_vectors(path):
    """(words, (N, E) float32 array) of a GloVe or word2vec text file: a word, then its numbers."""
    words, vectors, width = {}, [], None
    for n, line in stripped_lines(path):
        fields = [field for field in line.replace("\t", " ").split(" ") if field]
        if not fields or n == 1 and len(fields) == 2:        # word2vec's first line is two counts
            continue
        width = width or len(fields) - 1
        word = lookup_form(" ".join(fields[:-width]).lower())               # it may hold a space
        where, wanted = f"{path}, line {n}", f"a word and {width or 'its'} numbers"
        with one_line(f"{where}: expected {wanted}"):
            vector = np.fromiter(map(float, fields[-width:]), dtype=float)
        good = word and len(vector) == width and (abs(vector) < 1e38).all()
        expect(good, where, wanted, line)
        if words.setdefault(word, n) == n:                   # a word counts where it comes first
            vectors.append(vector.astype(np.float32))
    expect(words, path, "a word and its numbers on every line", "none")
    return list(words), np.stack(vectors)

class ContextualVectors:
    """Vectors from the function `features` in a file of the user's. Without one: 0 layers."""

    def __init__(self, path="", shape=(0, 0)):
        """shape: (layers, width), if a trained run says so. Else the first sentence does."""
        self.path, self.shape, self.kept = path, tuple(shape), {}      # kept: {sentence: tensor}
        if path or any(shape):
            run = ", as the run's, of {} layers of width {}".format(*shape) if any(shape) else ""
            expect(Path(path).is_file(), "--features", f"a file{run}", path or "none")
            with one_line(f"{path}: expected Python code", path), torch.no_grad():
                self.function = runpy.run_path(path).get("features")
            expect(callable(self.function), path, "a function features(sentences)", "none")

    def __call__(self, sentences):
        """(layers, words of all sentences, width), in half precision."""
        keys = [tuple(words) for words in sentences]
        found = self.kept if self.kept.keys() >= {*keys} else self.compute(keys)
        return torch.cat([found[words] for words in keys], 1)

    def keep(self, tasks):
        """Computes the vectors of all sentences of the tasks, once."""
        if self.path:
            splits = chain(*(task.data.values() for task in tasks))
            self.kept = self.compute(tuple(x) for d in chain(*splits) for x in d.sentences if x)
            size = sum(x.nbytes for x in self.kept.values()) / 1e6
            print(f"features: {len(self.kept)} sentences,",
                  "{} layers of width {}, {:.0f} MB".format(*self.shape, size))

    def compute(self, sentences):
        """{tuple of words: tensor}. The function gets 32 sentences of similar lengths at a time."""
        where, found, sentences = f"{self.path}: features()", {}, sorted({*sentences})
        for indices in by_length([*map(len, sentences)], 32):
            asked = [sentences[i] for i in indices]
            with one_line(f"{where}: expected a list of arrays", self.path), torch.no_grad():
                arrays = self.function([list(words) for words in asked])
                arrays = [torch.as_tensor(x).cpu() for x in arrays]
            expect(len(arrays) == len(asked), where, f"{len(asked)} arrays", str(len(arrays)))
            for words, x in zip(asked, arrays):
                if not any(self.shape) and x.ndim == 3:
                    self.shape = x.shape[0], x.shape[2]
                wanted = self.shape[0] or "layers", len(words), self.shape[1] or "width"
                expect(x.is_floating_point() and x.shape == wanted, where,
                       "floats ({}, {} words, {})".format(*wanted), f"{x.dtype} {tuple(x.shape)}")
                expect(x.half().isfinite().all(), where, "finite numbers up to 65504", "others")
                found[words] = x.half()
        return found

def by_length(lengths, size):
    """Lists of up to `size` indices. Those of similar lengths stand together."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return [order[i:i + size] for i in range(0, len(order), size)]

# The assignment of CEAF-e.
def best_matching_sum(value):
    """The largest sum of entries >= 0, at most one a row and column (Jonker & Volgenant 1987)."""
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

# The built-in corpus. Most endings tell the type of a name, AMBIGUOUS names have it only from the
# sentence. "P of X" is a job if X is an organisation, a home if it is a place; "P left O for N"
# relates P to N alone. Relations hold between names. Pronouns and nominals refer to the only
# entity of their type and gender in the sentence before.
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
