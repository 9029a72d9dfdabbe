"""The four tasks: their documents, their batches, their scores. Read this first, then hmtl.py.

A `Document` holds sentences and up to four kinds of annotation, one per task:

    ner    named entities      [Ada Kell]PER works for [Nordex]ORG
    emd    entity mentions     [Ada Kell]PER ... [she]PER ... [the company]ORG   (names included)
    rel    relations           Ada Kell --Works_For--> Nordex
    coref  coreference         {Ada Kell, she}  {Nordex, the company}

It comes from JSON lines (`read_json`), from columns (`read_columns`), from raw text (`read_text`)
or from the built-in grammar (`builtin_documents`). A `Task` names its annotation, holds its train,
dev and test documents and cuts them into batches; `make_batch` turns documents into tensors with a
`Vocabulary`. The scores at the end are those of the official scorers, on plain Python spans.

A span is (start, end) in tokens, the end inclusive. Every F1 here is built from four sums
[hits among predicted, predicted, hits among gold, gold], added over documents before any division;
the two hits differ for coreference only.
"""

import json
import math
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
import torch


class InputError(Exception):
    """Bad input: one line that says where, what was expected and what was found."""


# ------------------------------------------------------------------------------------- documents

@dataclass
class Document:
    """Sentences and their annotations: None is not annotated, an empty list is none there.

    Offsets count tokens from the start of the document. Per sentence: `ner` and `emd` hold
    (start, end, label), `relations` (start1, end1, start2, end2, label). Per document: `clusters`
    holds lists of (start, end).
    """
    key: str
    sentences: list                      # of lists of words
    ner: list | None = None
    emd: list | None = None
    relations: list | None = None
    clusters: list | None = None

    def parts(self, max_tokens):
        """Cuts the document between sentences into documents of at most max_tokens each (a longer
        sentence stays whole), with offsets of their own; empty sentences are left out."""
        first, start, size = 0, 0, 0
        for i, n in enumerate([*map(len, self.sentences), math.inf]):
            if size and size + n > max_tokens:                  # the inf closes the last part
                yield self.part([k for k in range(first, i) if self.sentences[k]], start, size)
                first, start, size = i, start + size, 0
            size += n

    def part(self, kept, start, size):
        """The sentences with the numbers in kept, which lie in the size tokens from start."""
        lists = [rows and [[shifted(row, -start) for row in rows[k]] for k in kept]
                 for rows in (self.ner, self.emd, self.relations)]
        clusters = self.clusters and [
            [shifted(m, -start) for m in cluster if start <= m[0] and m[1] < start + size]
            for cluster in self.clusters]
        clusters = clusters and [cluster for cluster in clusters if len(cluster) > 1]
        return Document(self.key, [self.sentences[k] for k in kept], *lists, clusters)

    def to_json(self):
        """The document as one line of the JSON format that `read_json` reads."""
        row = {"doc_key": self.key, "sentences": self.sentences, "ner": self.ner, "emd": self.emd,
               "relations": self.relations, "clusters": self.clusters}
        return json.dumps({k: v for k, v in row.items() if v is not None}, ensure_ascii=False)


def shifted(row, n):
    """A span or relation with n added to its offsets."""
    return tuple(x if isinstance(x, str) else x + n for x in row)


def expect(condition, where, expected, found):
    if not condition:
        raise InputError(f"{where}: expected {expected}, found {json.dumps(found)[:60]}")


def read_json(path):
    """Documents from JSON lines, the format of SciERC and DyGIE++. Errors name file and line."""
    return [parse_document(line, f"{path}, line {n}", f"{path}:{n}")
            for n, line in enumerate(read_lines(path), 1) if line.strip()]


def read_lines(path):
    try:
        with open(0 if str(path) == "-" else path, encoding="utf-8-sig") as file:
            return file.read().split("\n")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected UTF-8 text, found {error.reason} "
                         f"at byte {error.start}") from None


def parse_document(line, where, key):
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: expected one JSON object a line, found text that is not "
                         f"({getattr(error, 'msg', error)})") from None
    expect(isinstance(row, dict), where, "one JSON object a line", row)
    key = row.get("doc_key", key)
    expect(isinstance(key, str) and is_text(key), where, "a string as doc_key", key)
    sentences = row.get("sentences")
    expect(isinstance(sentences, list) and all(isinstance(s, list) for s in sentences), where,
           "sentences as a list of lists of words", sentences)
    for word in (w for words in sentences for w in words):
        expect(isinstance(word, str) and word.strip() and is_text(word), where,
               "every word to be a non-empty string of valid characters", word)

    ends = np.cumsum([0, *map(len, sentences)]).tolist()

    def rows_of(name, n_offsets):
        """The rows of one annotation, checked and as tuples; None where the key is absent."""
        rows, here = row.get(name), f"{where}, {name}"
        if rows is None:
            return None
        if name == "clusters":
            expect(isinstance(rows, list), here, "a list of clusters", rows)
            bounds = [(0, ends[-1])] * len(rows)
        else:
            expect(isinstance(rows, list) and len(rows) == len(sentences), here,
                   f"one list for each of the {len(sentences)} sentences", rows)
            bounds = zip(ends, ends[1:])
        checked = []
        for items, (low, high) in zip(rows, bounds):
            expect(isinstance(items, list), here, "a list", items)
            for item in items:
                shape = [int] * n_offsets + [str] * (name != "clusters")
                expect(isinstance(item, list) and [type(x) for x in item] == shape, here,
                       f"[{', '.join(t.__name__ for t in shape)}]", item)
                for start, end in zip(item[0:n_offsets:2], item[1:n_offsets:2]):
                    expect(low <= start <= end < high, here,
                           f"{low} <= start <= end < {high}", item)
                expect(name == "clusters" or item[-1].strip() and is_text(item[-1]), here,
                       "a label with characters", item)
            checked.append(list(dict.fromkeys(map(tuple, items))))  # the same row twice is one row
        return checked

    clusters = rows_of("clusters", 2)
    twice = [m for m, n in Counter(m for c in clusters or [] for m in c).items() if n > 1]
    expect(not twice, f"{where}, clusters", "every span in at most one cluster", twice)
    return Document(key, sentences, rows_of("ner", 2), rows_of("emd", 2), rows_of("relations", 4),
                    clusters)


def is_text(string):
    """False for lone surrogates, which JSON can spell and no file or screen can show."""
    return not any("\ud800" <= c <= "\udfff" for c in string)


def read_columns(path, annotation):
    """Documents of one sentence from columns: word first, tag last, a blank line after a sentence.

    Tags are BIO, BIOES or BIOUL, and become that annotation, `ner` or `emd`. `-DOCSTART-` lines are
    skipped.
    """
    documents, words, tags = [], [], []
    for n, line in enumerate([*read_lines(path), ""], 1):
        line = line.strip("\r\n \t")
        if not line and words:
            name = f"{path}:{n - len(words)}"
            documents.append(Document(name, [words], **{annotation: [spans_of(tags)]}))
            words, tags = [], []
        elif line and not line.startswith("-DOCSTART-"):
            columns = line.split("\t") if "\t" in line else line.split()
            where = f"{path}, line {n}"
            expect(len(columns) > 1, where, "a word and a tag", line)
            expect(re.fullmatch(r"O|[BIELSU]-.*\S.*", columns[-1]), where,
                   "a tag: O, or B-, I-, E-, L-, S- or U- and a label", columns[-1])
            expect(columns[0].strip(), where, "a word in the first column", line)
            words.append(columns[0])
            tags.append(columns[-1])
    return documents


def spans_of(tags):
    """[(start, end, label)] of BIO, BIOES or BIOUL tags, ill-formed ones read as conlleval does:
    a span starts at B, S, U and wherever nothing of its label is open."""
    spans, closed = [], True
    for t, tag in enumerate(tags):
        prefix, _, label = tag.partition("-")
        if tag == "O":
            closed = True
            continue
        if prefix in "BSU" or closed or spans[-1][2] != label:
            spans.append((t, t, label))
        else:
            spans[-1] = (spans[-1][0], t, label)
        closed = prefix in "ELSU"
    return spans


TITLES = ["Mr", "Ms", "Dr", "Mrs"]                     # their full stop ends no sentence
WORD = re.compile(r"\b(?:" + "|".join(TITLES) + r")\.|(?:[A-Z]\.){2,}|\d+(?:[.,:]\d+)*(?:%|\w*)"
                  r"|\w+(?=n['’]t\b)|n['’]t\b|['’](?:s|ll|re|ve|d|m)\b|\w+(?:[-&]\w+)*|\S")
SENTENCE_END = re.compile("".join(rf"(?<!\b{title})" for title in TITLES)
                          + r"(?<!\b[A-Z])[.!?][\"')\]”’]*(?=\s+[\"'(\[]*[A-Z0-9])|\n\s*\n")


def read_text(path, longest=300):
    """One document of raw text from a file, or from standard input for `-`. What has more than
    `longest` words without an end of sentence is cut: relations take memory for all pairs."""
    text = "\n".join(read_lines(path))
    cuts = [0, *(m.end() for m in SENTENCE_END.finditer(text)), len(text)]
    sentences = [WORD.findall(text[a:b]) for a, b in zip(cuts, cuts[1:])]
    expect(any(sentences), path, "some text", text)
    if max(map(len, sentences)) > longest:
        print(f"{path}: cut: text without an end of sentence for {longest} words", file=sys.stderr)
    return Document(Path(path).stem, [words[i:i + longest] for words in sentences
                                for i in range(0, len(words), longest)])


# ------------------------------------------------------------------------------- built-in corpus
#
# Invented news. A name is a random stem and an ending; endings, not whole names, tell most types
# apart, so a test name can be classified though it was never seen. AMBIGUOUS names are of any
# type: only the sentence tells. "P of X" is a job where X is an organisation, a home where it is a
# place: finding the relation takes knowing the type, which the small relation set alone does not
# teach. "P left O for N" makes a relation with one of two organisations: the types alone do not
# tell. Relations hold between names. Pronouns and nominals refer to somebody of their type, where
# gender leaves one candidate among these.

STEMS = """ab al an ar bal bel ber bor bran cal car cor dal dan del dor dun el er fal fen for gal
 gar gor hal har hol il jan jor kal kel kir kor lam len lin lor mal mar mel mor nal nar nel nor ol
 or pal pel por ral ran rel ros sal sar sel sor tal tar tel tor ul val ver vil vor wal wen wil yar
 yor zal zen zor""".split()
ENDINGS = {
    "PER": """ez man son ova ski sen ini elli ard win wick smith field er ak uk ian oglu dottir
     strom quist berg eau off enko vic ert olf ano ides""".split(),
    "ORG": """ex tron soft corp tech dyne gen mart net bank air oil gas bus com pharm media chem
     sys link works line flex star data lab mobil nova tel um""".split(),
    "LOC": """ville stad burg ia ton ford mouth shire port land pool bury grad polis stan berg
     field hampton dale wood ham by heim hafen ica aria mere brook ora ino""".split()}
FIRST_NAMES = {"she": """Ada Anna Clara Dora Elena Emma Eva Fiona Greta Hanna Ida Ines Irene Julia
     Karen Laura Lena Lucy Maria Nina Nora Olga Paula Rita Rosa Sara Sofia Tina Vera Zoe""".split(),
               "he": """Adam Alan Boris Carl David Emil Eric Felix Frank George Hugo Igor Ivan Jack
     James Karl Leo Luis Mark Max Nick Oscar Otto Paul Peter Ralph Simon Tom Victor""".split()}
AMBIGUOUS = """Austin Benton Carson Chester Clinton Dayton Denver Florence Ford Georgia Hamilton
 Houston Jackson Jordan Lincoln Madison Marshall Milton Orlando Paris Preston Sidney Stanley
 Victoria Warwick""".split()
NOMINALS = {"PER": ["the lawyer", "the banker", "the engineer", "the politician"],
            "ORG": ["the company", "the firm", "the group"], "LOC": ["the city", "the town"]}

# Slots: P Q people, O N organisations, L M places, as names; p o l refer back. (a|b) is a choice.
TEMPLATES = [line.split("#") for line in """
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
In l , p (had no comment|gave a speech|met reporters) . #
""".strip().splitlines()]


def builtin_documents(n, rng, name="news"):
    """n invented news documents, annotated for all four tasks, from a numpy random generator."""
    return [builtin_document(f"{name}-{i}", rng) for i in range(n)]


def builtin_document(key, rng):
    def pick(options):
        return options[rng.integers(len(options))]

    def entity(kind):
        name = None
        while name is None or name in taken:      # two of one name could not be told apart
            name = (pick(STEMS) + (pick(STEMS) if rng.random() < 0.5 else "")
                    + pick(ENDINGS[kind])).capitalize()
            name = pick(AMBIGUOUS) if rng.random() < 0.15 else name
        taken.add(name)
        gender = pick(["she", "he"]) if kind == "PER" else "it"
        full = [name]
        if kind == "PER":
            full = [pick(FIRST_NAMES[gender]), name]
        elif kind == "ORG" and rng.random() < 0.2:
            full = [name, pick(["Group", "Holdings"])]
        return {"kind": kind, "full": full, "short": [name], "gender": gender, "mentions": [],
                "nominal": pick(NOMINALS[kind]).split()}

    taken = set()
    cast = {kind: [entity(kind) for _ in range(3)] for kind in NOMINALS}
    kinds = dict(zip("PQONLM", ["PER", "PER", "ORG", "ORG", "LOC", "LOC"]))
    document = Document(key, [], [], [], [], [])
    offset, previous = 0, []                      # the entities that the last sentence named
    for n in range(5):
        template, relations = pick(TEMPLATES if n else TEMPLATES[:-6])   # the last refer back
        template = re.sub(r"\(([^)]*)\)", lambda m: pick(m[1].split("|")), template)
        words, ner, emd, spans, named = [], [], [], {}, []
        for symbol in template.split():
            if symbol.upper() not in kinds:
                words.append(symbol)
                continue
            kind = kinds[symbol.upper()]
            recent = [e for e in previous if e["kind"] == kind]
            who = pick([e for e in cast[kind] if e not in named])
            if symbol.islower() and recent and recent[0] not in named:
                who = recent[0]
            rivals = [e for e in recent if e["gender"] == who["gender"]]
            if symbol.islower() and rivals == [who] and rng.random() < 0.8:
                form = [who["gender"]] if rng.random() < 0.6 else who["nominal"]
            else:                                 # in full at first, in short from then on
                form = who["short"] if who["mentions"] else who["full"]
            start, end = offset + len(words), offset + len(words) + len(form) - 1
            words += form
            emd.append((start, end, kind))
            if form in (who["full"], who["short"]):
                ner.append((start, end, kind))
            who["mentions"].append((start, end))
            spans[symbol] = (start, end)
            named.append(who)
        words[0] = words[0][0].upper() + words[0][1:]
        document.sentences.append(words)
        document.ner.append(ner)
        document.emd.append(emd)
        document.relations.append([(*spans[a], *spans[b], label) for a, label, b in
                                   (r.split() for r in relations.split(" ; ") if r.strip())])
        offset, previous = offset + len(words), named
    document.clusters = [e["mentions"] for kind in cast for e in cast[kind]
                         if len(e["mentions"]) > 1]
    return document


# ----------------------------------------------------------------------------------------- tasks

@dataclass
class Task:
    """One task: its annotation, the dev score that training watches, and its documents.

    `annotation` is the name of its field of a Document. Tasks of sentences see each sentence as a
    document of its own; a task of `whole_documents` sees a document at a time.
    """
    name: str
    annotation: str
    validation_metric_name: str
    whole_documents: bool = False
    validation_metric_decreases: bool = False
    builtin_size: int = 0                         # training documents in the built-in corpus
    data: dict = field(default_factory=dict)      # "train", "dev", "test" -> documents
    n_cut: int = 0                                # training documents that were too long
    plan: tuple = (None, None)                    # (which pass over the data, its batches)

    def load_data(self, folder=None, max_tokens=sys.maxsize):
        """Reads train, dev and test from a folder, or makes them where there is none.

        Keeps the documents that carry this task's annotation; cuts training documents longer than
        max_tokens. Raises InputError.
        """
        sizes = {"train": self.builtin_size, "dev": 60, "test": 100}
        for number, (split, size) in enumerate(sizes.items()):
            if folder is None:   # the tasks share dev and test documents; each has its own to train
                rng = np.random.default_rng([number, *(self.name.encode() * (split == "train"))])
                documents = builtin_documents(size, rng, f"{self.name}-{split}")
            else:
                documents = read_split(folder, split, self.annotation)
            longest = 1                               # so every sentence is a part of its own
            if self.whole_documents:
                longest = max_tokens if split == "train" else sys.maxsize
            documents = [d for d in documents if getattr(d, self.annotation) is not None]
            self.data[split] = [part for d in documents for part in d.parts(longest)]
            if self.whole_documents and split == "train":
                self.n_cut = sum(sum(map(len, d.sentences)) > max_tokens for d in documents)
            if not self.data[split]:
                raise InputError(f"{folder}: expected {split} documents with the key "
                                 f"'{self.annotation}' for the task {self.name}, found none")

    def labels(self):
        """The labels of the training documents, sorted; coreference has none."""
        if self.whole_documents:
            return []
        return sorted({row[-1] for d in self.data["train"]
                       for row in getattr(d, self.annotation)[0]})

    def batch_size(self, size):
        """size sentences; a whole document is a batch."""
        return 1 if self.whole_documents else size

    def n_batches(self, size):
        """Training batches in one pass over the data."""
        return math.ceil(len(self.data["train"]) / self.batch_size(size))

    def batch(self, n, size, seed):
        """The documents of training batch number n = 0, 1, ...: a function of its arguments, so a
        resumed run needs to know only how many batches were drawn."""
        epoch, n = divmod(n, self.n_batches(size))
        if self.plan[0] != (epoch, size, seed):       # a plan holds for a pass over the data
            lengths = [sum(map(len, d.sentences)) for d in self.data["train"]]
            rng = np.random.default_rng([seed, *self.name.encode(), epoch])
            self.plan = (epoch, size, seed), plan_batches(lengths, self.batch_size(size), rng)
        return [self.data["train"][i] for i in self.plan[1][n]]


def tasks_in_order():
    """The four tasks, from the simplest to the most complex."""
    return [Task("ner", "ner", "f1", builtin_size=300),
            Task("emd", "emd", "f1", builtin_size=200),
            Task("rel", "relations", "last-token", builtin_size=60),
            Task("coref", "clusters", "mean", whole_documents=True, builtin_size=120)]


def plan_batches(lengths, size, rng):
    """Index arrays of batches of like lengths, in random order: padding costs time."""
    noisy = np.array(lengths) * rng.uniform(0.9, 1.1, len(lengths))
    batches = np.split(np.argsort(noisy), range(size, len(lengths), size))
    return [batches[i] for i in rng.permutation(len(batches))]


def read_split(folder, split, annotation):
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: expected a folder, found "
                         + ("a file" if Path(folder).exists() else "nothing of that name"))
    paths = [Path(folder) / (split + e) for e in (".json", ".jsonl", ".conll", ".txt", ".bio")]
    found = [path for path in paths if path.is_file()]
    if len(found) != 1:
        raise InputError(f"{folder}: expected one file {split}.json, .jsonl, .conll, .txt or .bio, "
                         f"found {' and '.join(path.name for path in found) or 'none'}")
    if found[0].suffix in (".json", ".jsonl"):
        return read_json(found[0])
    return read_columns(found[0], annotation) if annotation in ("ner", "emd") else []


# --------------------------------------------------------------------------------------- batches

class Vocabulary:
    """Words (lower-cased) and characters with their numbers: 0 is padding, 1 the unknown.

    `words`: first those of the training documents, then those that only the vector file has.
    `counts`: in how many training documents each of the former is, inf for the two numbers above.
    """
    LONGEST = 40     # characters of a word that are read; a web address need not be read to its end

    def __init__(self, words, chars, counts):
        self.words, self.chars, self.counts = words, chars, counts
        self.word_ids = {word: i for i, word in enumerate(words)}
        self.char_ids = {char: i for i, char in enumerate(chars)}
        self.spellings = {}

    def spelling(self, word):
        """The numbers of a word's characters, and a 0."""
        if word not in self.spellings:
            self.spellings[word] = [*(self.char_ids.get(c, 1) for c in word[:self.LONGEST]), 0]
        return self.spellings[word]

    @classmethod
    def of(cls, documents, more_words=()):
        # Counted are documents, not tokens: a name that one document repeats is new to any other.
        seen = {(d.key, word) for d in documents for words in d.sentences for word in words}
        counts = Counter(word for _, word in {(key, word.lower()) for key, word in seen})
        words = sorted(counts, key=lambda word: (-counts[word], word))
        return cls(["", "<unknown>", *words, *(w for w in more_words if w not in counts)],
                   ["", "<unknown>", *sorted({c for _, word in seen for c in word})],
                   [math.inf, math.inf, *(counts[word] for word in words)])

    def state(self):
        return {"words": self.words, "chars": self.chars, "counts": self.counts}


@dataclass
class Batch:
    """Documents as tensors. The sentences of all documents lie side by side, empty ones left out.
    For a loss or a score the documents are what `Task.batch` returns: one sentence each, or, for
    coreference, one whole document.

    B sentences, T tokens in the longest, U distinct words, C characters in all of these.
    """
    documents: list
    lengths: list             # B sentence lengths
    words: torch.Tensor       # (U,) vocabulary numbers of the distinct words; word 0 is padding
    chars: torch.Tensor       # (C + U + 1,) their characters, 0 before, between and behind words
    n_chars: torch.Tensor     # (U,) how many each has
    tokens: torch.Tensor      # (B, T) numbers of distinct words, 0 is padding
    mask: torch.Tensor        # (B, T) True on tokens, False on padding
    groups: list              # [(rows of some sentences of like lengths, the longest length)]

    def to(self, device):
        return Batch(self.documents, self.lengths, *(x.to(device) for x in
                     (self.words, self.chars, self.n_chars, self.tokens, self.mask)),
                     [(rows.to(device), longest) for rows, longest in self.groups])


def make_batch(documents, vocabulary):
    sentences = [words for d in documents for words in d.sentences if words]
    distinct = {"": 0}
    rows = [[distinct.setdefault(word, len(distinct)) for word in words] for words in sentences]
    tokens = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
    for line, row in zip(tokens, rows):
        line[:len(row)] = row
    spellings = [vocabulary.spelling(word) for word in distinct]
    arrays = (np.array([vocabulary.word_ids.get(word.lower(), 1) for word in distinct]),
              np.array([0, *chain.from_iterable(spellings)]),
              np.array([len(spelling) - 1 for spelling in spellings]), tokens, tokens > 0)
    lengths = np.array([len(row) for row in rows])
    # Where padding would be more than a third, as in a document, sentences of like lengths go
    # through the LSTMs together: two to six times less work, and memory.
    size = 8 if tokens.size > 1.5 * lengths.sum() else len(lengths)
    groups = np.split(np.argsort(lengths, kind="stable"), range(size, len(lengths), size))
    return Batch(documents, lengths.tolist(), *map(torch.from_numpy, arrays),
                 [(torch.from_numpy(rows), int(lengths[rows].max())) for rows in groups])


def read_vectors(path):
    """(words, (N, D) float32 array) of a GloVe or word2vec text file: a word, then its numbers."""
    vectors, width = {}, None
    for n, line in enumerate(read_lines(path), 1):
        fields = re.split(r"[ \t]+", line.strip(" \t\r"))
        if fields == [""] or n == 1 and len(fields) == 2:   # word2vec's first line is two counts
            continue
        width = width or len(fields) - 1
        # A word may hold a space; the numbers are the last fields.
        word, numbers = " ".join(fields[:-width]), fields[len(fields) - width:]
        try:
            vector = np.array(numbers, dtype=float)
        except ValueError:
            vector = np.array([np.nan])
        if not word or not (np.abs(vector) < 1e30).all():   # false for nan as well
            raise InputError(f"{path}, line {n}: expected a word and {width or 'its'} numbers, "
                             f"found {json.dumps(line[:60])}")
        vectors.setdefault(word.lower(), vector)
    expect(vectors, path, "a word and its numbers on every line", "none")
    return list(vectors), np.stack(list(vectors.values())).astype(np.float32)


# ---------------------------------------------------------------------------------------- scores

class Scores:
    """Adds up four sums per name and turns them into F1, precision and recall, in percent; `mean`
    names the mean of all F1, where that is a score too."""

    def __init__(self, names, mean=None):
        self.names, self.mean = names, mean
        self.reset()

    def reset(self):
        self.sums = torch.zeros(len(self.names), 5, dtype=torch.float64)   # last: times added

    def add(self, name, counts):
        self.sums[self.names.index(name)] += torch.tensor([*counts, 1], dtype=torch.float64)

    def compute(self):
        """{name: F1, name-precision, name-recall}, of the names that were added; 0 / 0 = 0."""
        scores = {}
        for name, (hit_p, predicted, hit_g, gold, times) in zip(self.names, self.sums.tolist()):
            if times:
                p, r = 100 * hit_p / (predicted or 1), 100 * hit_g / (gold or 1)
                scores |= {name: 2 * p * r / (p + r or 1), f"{name}-precision": p,
                           f"{name}-recall": r}
        if self.mean and scores:
            scores[self.mean] = sum(scores[name] for name in self.names) / len(self.names)
        return scores


def count_rows(predicted, gold):
    """Counts for spans with a label, or relations: a row counts where it is there exactly."""
    predicted, gold = set(predicted), set(gold)
    hits = len(predicted & gold)
    return hits, len(predicted), hits, len(gold)


def muc(predicted, gold):
    """Vilain et al. 1995: links. A cluster of n mentions has n - 1; the other side lacks one for
    every part but the first into which it splits the cluster."""
    def links(clusters, others):
        owner = {m: i for i, cluster in enumerate(others) for m in cluster}
        return sum(len(c) - len({owner.get(m, m) for m in c}) for c in clusters)
    return (links(predicted, gold), sum(len(c) - 1 for c in predicted),
            links(gold, predicted), sum(len(c) - 1 for c in gold))


def b_cubed(predicted, gold):
    """Bagga & Baldwin 1998: for every mention, the share of its cluster that it shares with the
    other side's cluster of the same mention."""
    def shares(clusters, others):
        owner = {m: i for i, cluster in enumerate(others) for m in cluster}
        return sum(n * n / len(c) for c in clusters
                   for n in Counter(owner[m] for m in c if m in owner).values())
    return (shares(predicted, gold), sum(map(len, predicted)),
            shares(gold, predicted), sum(map(len, gold)))


def ceaf_e(predicted, gold):
    """Luo 2005, phi4: the best one-to-one match of clusters by 2 |P & G| / (|P| + |G|)."""
    similarity = np.zeros((len(predicted), len(gold)))
    owner = {m: j for j, cluster in enumerate(gold) for m in cluster}
    for i, cluster in enumerate(predicted):
        for j, n in Counter(owner[m] for m in cluster if m in owner).items():
            similarity[i, j] = 2 * n / (len(cluster) + len(gold[j]))
    best = max_assignment(similarity)
    return best, len(predicted), best, len(gold)


COREF_SCORES = {"muc": muc, "b_cubed": b_cubed, "ceaf_e": ceaf_e}


def max_assignment(value):
    """The largest sum of entries of a matrix, at most one in a row and in a column, all >= 0.

    Successive shortest paths with row and column potentials (Jonker & Volgenant 1987), O(n^3).
    """
    cost = -value if len(value) <= value.shape[1] else -value.T
    n, m = cost.shape
    u, v = np.zeros(n), np.zeros(m)   # in the rows so far, cost - u - v is 0 where matched, or >= 0
    row_of = np.full(m, -1)                        # the row matched to each column
    for row in range(n):
        distance, came_from, done = np.full(m, np.inf), np.full(m, -1), np.zeros(m, dtype=bool)
        i, column, shortest = row, -1, 0.0
        while i >= 0:                              # grow shortest paths until a column is free
            reduced = shortest + cost[i] - u[i] - v
            closer = ~done & (reduced < distance)
            distance[closer], came_from[closer] = reduced[closer], column
            column = int(np.where(done, np.inf, distance).argmin())
            done[column], shortest, i = True, distance[column], row_of[column]
        reached = done & (row_of >= 0)
        u[row_of[reached]] += shortest - distance[reached]
        u[row] += shortest
        v[done] -= shortest - distance[done]
        while column >= 0:                         # turn the matches along the path around
            before = came_from[column]
            row_of[column] = row if before < 0 else row_of[before]
            column = before
    return float(sum(-cost[i, j] for j, i in enumerate(row_of) if i >= 0))
