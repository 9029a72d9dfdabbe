"""Training: every step trains one task, drawn at random. Read tasks.py and hmtl.py before.

    python train.py --tasks ner rel                       # the built-in corpus
    python train.py --tasks ner rel --data DIR --vectors glove.txt
    python train.py --run runs/ner-rel --resume           # go on after any interruption
    python train.py --run runs/ner-rel --predict FILE     # such as raw text; - is standard input

An epoch has as many steps as all tasks together have training batches. Each step draws a task,
with a probability in proportion to its number of batches, and updates the model on the task's
next batch. After every epoch each task is scored on dev, and its best weights are kept. Training
ends after `epochs` epochs, or earlier if no task has improved for `patience` epochs.

The code below "Skip this on a first reading" holds settings, variants, files, printed output.
"""

import argparse
import json
import os
import re
import shlex
import sys
import time
import zipfile
from collections import Counter
from dataclasses import asdict, dataclass, field, fields, replace
from hashlib import sha256
from itertools import chain, count
from pathlib import Path

import numpy as np
import torch
from torch import nn, optim

from hmtl import HIERARCHY, SHARINGS, Tagger, annotate
from tasks import (JSON_SUFFIXES, ContextualVectors, InputError, Vocabulary, choose_tasks,
                   cut_sentences, expect, file_of, lookup_form, make_batch, one_line, per_task,
                   read_annotated, read_documents, read_text, read_vectors, spans_of, suffix_of,
                   tags_of, to_json)

# ------------------------------------------------------------------------------- which task next
def sampling_probabilities(schedule, n_batches):
    """Each task's share of all batches, as its probability. With "uniform", all are equal."""
    shares = np.ones(len(n_batches)) if schedule == "uniform" else np.array(n_batches)
    return shares / shares.sum()

def choose_task(sampling_prob, rng):
    """The index of the task to train next: one multinomial draw from a numpy generator."""
    draw = rng.multinomial(1, sampling_prob)                     # such as [0, 1, 0]
    return int(draw.argmax())

def plan_epoch(schedule, n_batches, rng):
    """For every step of an epoch, the index of the task to train."""
    # Tasks with 3, 2 and 1 batches have epochs of 6 steps, such as [0, 1, 0, 0, 1, 0].
    sampling_prob = sampling_probabilities(schedule, n_batches)
    return [choose_task(sampling_prob, rng) for _ in range(sum(n_batches))]

# ------------------------------------------------------------------------------------ the trainer
def best_epoch(scores):
    """The index of the best score; of equal ones, the first."""
    return scores.index(max(scores))

def epochs_waited(scores):
    """The number of epochs since the best score."""
    # A task whose score is still 0 has not begun to learn. It does not use up its patience.
    return len(scores) - 1 - best_epoch(scores) if any(scores) else 0

def evaluate(model, vocabulary, task, documents):
    """The scores of one task on annotated documents: {score name: percent}."""
    model.eval()
    model.get_metrics(task.name, reset=True)             # forget what was scored before
    documents = sorted(documents, key=len)
    size = task.documents_per_batch(32)
    for i in range(0, len(documents), size):
        batch = make_batch(documents[i:i + size], vocabulary).to(model.device())
        model(task.name, batch)                                  # counts its predictions
    return model.get_metrics(task.name)

class MultiTaskTrainer:
    """Trains a model on several tasks, and keeps the run in a folder."""

    def __init__(self, model, tasks, vocabulary, settings, folder):
        self.model = model
        self.tasks = tasks
        self.vocabulary = vocabulary
        self.settings = settings
        self.folder = Path(folder)
        # One Adam per task, over all weights. Adam divides each step by the usual size of the
        # gradients that it has seen. Each sees one task, so the scale of a loss hardly matters,
        # and no loss needs a weight. (fused: one operation for all weights, which is faster.)
        self.optimizers, self.lr_schedulers = {}, {}
        for task in tasks:
            adam = optim.Adam(model.parameters(), settings.lr, fused=True)
            self.optimizers[task.name] = adam
            # Plateau rule: after more than lr_patience epochs without a new best, halve the rate.
            self.lr_schedulers[task.name] = optim.lr_scheduler.ReduceLROnPlateau(
                adam, "max", factor=0.5, threshold=0, patience=settings.lr_patience)
        self.start_batches(steps={})
        self.history = []      # for every epoch its losses, dev scores, learning rates
        self.best = {}         # {task name or "mean": the weights of its best epoch}
        self.checksum = ""     # set by start_run: it identifies the documents of the run

    def start_batches(self, steps):
        """steps: {task name: the number of steps so far}. Each step draws one batch."""
        self.steps = {}
        self.batches = {}
        for task in self.tasks:
            start = steps.get(task.name, 0)
            self.steps[task.name] = start
            self.batches[task.name] = task.batches(self.settings.batch_size, self.settings.seed,
                                                   start)

    def train(self, n_epochs):
        """Trains until epoch number n_epochs, or until no task improves any more."""
        start_run(self)                                  # makes the folder of a new run
        while len(self.history) < n_epochs and not self.out_of_patience():
            started = time.time()
            losses = self.train_epoch(len(self.history))
            self.score_epoch(losses)
            end_epoch(self, time.time() - started, n_epochs)  # saves the run, prints a line

    def train_epoch(self, epoch):
        """Does as many steps as all tasks have training batches. Returns {task: mean loss}."""
        # Every epoch has its own seed: a resumed run draws the same numbers as an unbroken one.
        rng = np.random.default_rng([self.settings.seed, epoch])
        torch.manual_seed(int(rng.integers(2 ** 63)))       # for dropout, also of words
        self.model.train()
        losses = {}
        for index in self.plan(rng):
            task = self.tasks[index]
            loss = self.train_step(task)
            losses.setdefault(task.name, []).append(loss)
        return {name: float(torch.stack(values).mean()) for name, values in losses.items()}

    def n_batches(self):
        return [task.n_batches(self.settings.batch_size) for task in self.tasks]

    def plan(self, rng):
        return plan_epoch(self.settings.schedule, self.n_batches(), rng)

    def train_step(self, task):
        """One step on the next batch of a task. Returns the loss, a tensor."""
        # The next batch, as tensors.
        documents = next(self.batches[task.name])
        batch = make_batch(documents, self.vocabulary).to(self.model.device())
        self.steps[task.name] += 1
        # The gradient, with a norm of at most `clip`. zero_grad sets all gradients to None. If the
        # task does not use a weight, its gradient stays None, and Adam does not change it.
        self.model.zero_grad()
        loss = self.loss(task, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        # One step of the task's own optimizer.
        self.optimizers[task.name].step()
        return loss.detach()

    def loss(self, task, batch):
        return self.model(task.name, batch)["loss"]

    def score_epoch(self, losses):
        """Scores every task on dev, keeps the best weights, and applies the plateau rule."""
        rates = {name: adam.param_groups[0]["lr"] for name, adam in self.optimizers.items()}
        dev = {task.name: self.evaluate(task, "dev") for task in self.tasks}
        self.history.append({"epoch": len(self.history) + 1, "steps": dict(self.steps),
                             "loss": losses, "dev": dev, "lr": rates})
        # Keep these weights for every task whose new score is its best. The mean counts as a task.
        weights = {name: x.detach().clone() for name, x in self.model.state_dict().items()}
        for name, scores in self.watched_scores().items():
            if best_epoch(scores) == len(scores) - 1:
                self.best[name] = weights
        # The plateau rule. A task whose score is still 0 keeps its learning rate.
        for task in self.tasks:
            scores = self.dev_scores(task)
            if any(scores):
                self.lr_schedulers[task.name].step(scores[-1])

    def evaluate(self, task, split):
        """The scores of one task on its dev or test documents."""
        return evaluate(self.model, self.vocabulary, task, task.data[split])

    def dev_scores(self, task):
        """The validation metric on dev, for every epoch; negated if smaller is better."""
        sign = -1 if task.validation_metric_decreases else 1
        name = task.validation_metric_name
        return [sign * epoch["dev"][task.name][name] for epoch in self.history]

    def watched_scores(self):
        """{task name: its dev scores, and "mean": their mean over the tasks}."""
        scores = {task.name: self.dev_scores(task) for task in self.tasks}
        means = np.mean(list(scores.values()), axis=0)
        return {**scores, "mean": means.tolist()}

    def out_of_patience(self):
        """Whether all tasks have waited `patience` epochs. One that still scores 0 never has."""
        waited = [epochs_waited(self.dev_scores(task)) for task in self.tasks]
        return min(waited) >= self.settings.patience

    def final_scores(self):
        """{task name: {"own_best": {"dev": scores, "test": scores}, "one_model": the same}}."""
        # own_best: scores with the task's own best weights, as in the paper. one_model: with the
        # weights of the best mean, which the model has at the end.
        results = {}
        for task in self.tasks:
            results[task.name] = {}
            for kind, name in ("own_best", task.name), ("one_model", "mean"):
                self.model.load_state_dict(self.best[name])
                scores = {split: self.evaluate(task, split) for split in ("dev", "test")}
                results[task.name][kind] = scores
        return results

# ------------------------------------------------------------------------------------ a whole run
def run(settings, folder, features=""):
    """Builds the model, trains it and scores it. Returns the trainer and the scores."""
    tasks, vocabulary, model = build(settings, features)
    trainer = new_trainer(model, tasks, vocabulary, settings, folder)
    trainer.train(settings.epochs)
    return trainer, trainer.final_scores()

def build(settings, features=""):
    """(tasks with their data, vocabulary, model). features: path of the user's Python file."""
    tasks, vectors, contextual, device = load_inputs(settings, features)
    documents = [document for task in tasks for document in task.data["train"]]
    labels = {task.name: task.labels() for task in tasks}
    words = vectors[0] if vectors else ()           # vectors: (words, array), or None
    vocabulary = Vocabulary.from_documents(documents, words)
    torch.manual_seed(settings.seed)
    model_class = SHARINGS[settings.sharing]        # HMTL, unless --sharing is given
    model = model_class(tasks, labels, vocabulary, settings, vectors, contextual)
    return tasks, vocabulary, model.to(device)

# ================================================================================================
# Skip this on a first reading: settings, variants, files, the screen, the command line.
# ================================================================================================

def setting(default, help, low=1, high=1e9, choices=None):
    """A field of the settings: its default, the help of its flag, its possible values."""
    return field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices))

@dataclass
class Settings:
    """All settings of a run. Each of them is a flag."""
    # the data
    tasks: tuple = setting((), "tasks (default: those that the data carry)", choices=HIERARCHY)
    data: tuple = setting((), "DIR for all tasks, TASK=DIR for one (default: the built-in corpus)")
    vectors: str = setting("", "file of word vectors in the text format of GloVe or word2vec")
    max_tokens: int = setting(4000, "longer training documents of coreference are cut")
    # the model
    sharing: str = setting("hierarchical", "how tasks share encoders: as in the paper; one stack "
                           "(flat); complex tasks below (inverted); every head reads a mixture of "
                           "all (latent); one stack, one head for names and relations (question)",
                           choices=SHARINGS)
    encoder: tuple = setting(("1x200",), "layers x units per direction, or TASK=2x64 for one task")
    word_dim: int = setting(100, "width of word vectors, without --vectors")
    char_dim: int = setting(16, "width of character vectors")
    char_filters: int = setting(64, "filters of the char CNN")
    contextual_dim: int = setting(200, "width to which --features are projected; 0: as they are", 0)
    dropout: float = setting(0.5, "dropout of words, LSTM layers, coreference spans", 0, 0.99)
    rare: int = setting(1, "a word in at most this many training documents is rare", 0)
    unknown: float = setting(0.5, "probability that a rare word is unknown in training", 0, 1)
    relation_units: int = setting(128, "hidden units of the relation head")
    coref_units: int = setting(150, "hidden units of the coreference head")
    max_span: int = setting(8, "words in the longest span of coreference", 1, 1000)
    spans_per_token: float = setting(0.4, "spans that coreference keeps, per token", 1e-9)
    antecedents: int = setting(70, "how many kept spans back an antecedent is looked for")
    # the training
    batch_size: int = setting(16, "sentences in a batch; coreference reads one document")
    lr: float = setting(2e-3, "learning rate of every task's Adam", 1e-9)
    clip: float = setting(5.0, "largest norm of the gradient", 1e-9)
    schedule: str = setting("proportional", "how a step's task is chosen: in proportion to its "
                            "batches, evenly (uniform), one task after the other (successive)",
                            choices=["proportional", "uniform", "successive"])
    successive_delta: float = setting(1e-2, "how strongly successive holds the shared weights", 0)
    epochs: int = setting(40, "largest number of epochs")
    patience: int = setting(20, "stop when no task has improved for this many epochs")
    lr_patience: int = setting(4, "halve a task's learning rate when its dev score has not "
                               "improved for more than this many epochs", 0)
    seed: int = setting(0, "all random numbers follow from it", 0, 2 ** 63 - 1)
    threads: int = setting(1, "threads of the CPU; several are slow beside a busy program", 1, 1024)
    device: str = setting("", "such as cpu or cuda:1 (default: a GPU, if there is one)")

    def __post_init__(self):
        """Refuses values that no model can be built from."""
        for f in fields(self):
            flag, value, kind = flag_of(f.name), getattr(self, f.name), f.type
            low, high, choices = (f.metadata[key] for key in ("low", "high", "choices"))
            good = isinstance(value, (int, float) if kind is float else kind)
            expect(good, flag, f"a value of type {kind.__name__}", shown(value))
            good = kind in (str, tuple) or low <= value <= high
            expect(good, flag, f"a number from {low:g} to {high:g}", shown(value))
            for choice in (value if kind is tuple else [value]) if choices else []:
                expect(choice in choices, flag, f"one of {', '.join(choices)}", choice)
        for size in self.encoder:
            good = re.fullmatch(r"(.+=)?[1-9]\d?x[1-9]\d{,4}", size)
            expect(good, "--encoder", "sizes such as 2x64", size)

def flag_of(name):
    return "--" + name.replace("_", "-")

def shown(value):
    return (" ".join(value) if isinstance(value, tuple) else str(value)) or "none"

def chosen_tasks(settings):
    """settings.tasks, or else the tasks whose annotation the training documents carry."""
    named = [item.split("=")[0] for item in settings.data if "=" in item]
    for name in named:
        expect(name in HIERARCHY, "--data", f"one of the tasks {', '.join(HIERARCHY)}", name)
    if settings.tasks or not settings.data or len(named) == len(settings.data):
        return settings.tasks or tuple(named) or ("ner", "emd", "rel", "coref")
    folder = next(item for item in settings.data if "=" not in item)
    keys = {key for d in read_annotated(file_of(folder, "train"), "ner") for key in d.annotations}
    found = tuple(task.name for task in choose_tasks(HIERARCHY)
                  if task.annotation in keys or task.name in named)
    expect(found, folder, "training documents with the key of a task, such as 'ner'", "none")
    return found

# Other trainers.
class SuccessiveTrainer(MultiTaskTrainer):
    """One task after the other in every epoch, the lowest first. The loss of a task holds the
    shared weights near those after the task before (Hashimoto et al. 2017, section 3)."""

    def __init__(self, model, *arguments):
        super().__init__(model, *arguments)
        self.shared = [*model.embedder.parameters(), *model.encoders.parameters()]
        self.before = None                           # the task of the last step

    def plan(self, rng):
        return [index for index, n in enumerate(self.n_batches()) for _ in range(n)]

    def loss(self, task, batch):
        if task.name != self.before:                 # before the very first task there is none
            held = self.shared if sum(self.steps.values()) > 1 < len(self.tasks) else []
            self.anchor, self.before = [p.detach().clone() for p in held], task.name
        drift = sum(((p - a) ** 2).sum() for p, a in zip(self.shared, self.anchor))
        return super().loss(task, batch) + self.settings.successive_delta * drift

def new_trainer(model, tasks, vocabulary, settings, folder):
    """The trainer for the schedule of the settings."""
    kind = SuccessiveTrainer if settings.schedule == "successive" else MultiTaskTrainer
    return kind(model, tasks, vocabulary, settings, folder)

# Building, from settings or from the files of a run.
def load_inputs(settings, features):
    """Tasks with documents, (words, vectors) of a file or None, contextual vectors, the device."""
    tasks, contextual, vectors = load_tasks(settings), ContextualVectors(features), None
    if settings.vectors:
        vectors = read_vectors(settings.vectors)
        settings.word_dim, table = vectors[1].shape[1], {*vectors[0]}    # the file's width counts
        documents = chain(*(task.data["train"] for task in tasks))
        words = map(lookup_form, chain(*(x for d in documents for x in d.sentences)))
        share = np.mean([word.lower() in table for word in words])
        expect(share > 0, settings.vectors, "words of the training documents", "none")
        print(f"{settings.vectors}: vectors for {share:.1%} of the training tokens")
    contextual.keep(tasks)
    return tasks, vectors, contextual, device_of(settings)

def load_tasks(settings):
    """The chosen tasks with their documents."""
    settings.tasks = chosen_tasks(settings)
    tasks = choose_tasks(settings.tasks)
    folders = per_task(settings.data, settings.tasks, "--data") if settings.data else {}
    for task in tasks:
        task.load_data(folders.get(task.name), settings.max_tokens, [t.annotation for t in tasks])
    return tasks

def device_of(settings):
    """Sets the number of threads, and returns the device."""
    torch.set_num_threads(settings.threads)
    name = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with one_line(f"--device {name}"):
        torch.zeros(1, device=name).tolist()             # an error if there is no such device
    return torch.device(name)

def load_run(folder, features="", **changes):
    """(model, vocabulary) of a run, to predict with. changes: device, threads."""
    return restored(load(Path(folder, "model.pt")), folder, features, changes)[:2]

def resume(folder, features="", **changes):
    """The trainer of a run. changes: epochs, patience, device, threads, the place of the data."""
    state = load(Path(folder, "checkpoint.pt"))
    model, vocabulary, settings = restored(state, folder, features, changes)
    expect("history" in state, folder, "a checkpoint.pt", "another file of that name")
    done = len(state["history"])
    expect(settings.epochs >= done, "--epochs", f"at least the {done} of the run",
           str(settings.epochs))
    tasks = load_tasks(settings)
    expect(state["data"] == checksum(tasks), "--resume", "the documents of the run", "others")
    model.embedder.contextual.keep(tasks)
    trainer = new_trainer(model, tasks, vocabulary, settings, folder)
    for name, adam in trainer.optimizers.items():
        adam.load_state_dict(state[f"optimizer {name}"])
        trainer.lr_schedulers[name].load_state_dict(state[f"lr_scheduler {name}"])
    trainer.start_batches(state["steps"])
    trainer.history, trainer.best, trainer.checksum = (
        state[key] for key in ("history", "best", "data"))
    print_start(trainer)
    save_run(trainer)                                # after a kill, the other files may be older
    return trainer

def restored(state, folder, features, changes):
    """(model, vocabulary, settings) from what `model_state` saved, with those that may change."""
    with one_line(f"{folder}: expected files of train.py"):
        names, words, vectors = state["settings"]["tasks"], [], None
        expect(HIERARCHY.keys() >= {*names}, folder, "the script that defines its tasks "
               + " ".join(names), sys.argv[0])
        settings = Settings(**state["settings"])
        for name, value in changes.items():
            old, free = getattr(settings, name), ("epochs", "patience", "device", "data", "threads")
            same = name in free or value == old
            expect(same, flag_of(name), f"{shown(old)}, as in the run", shown(value))
        settings = replace(settings, **changes)
        if settings.vectors:                                     # these are stored apart, once
            vectors = words, _ = load(Path(folder, "vectors.pt"))
        expect(any(state["contextual"]) or not features, "--features", "none, as in the run",
               features)
        contextual = ContextualVectors(features, state["contextual"])
        vocabulary = Vocabulary(**state["vocabulary"], vector_words=words)
        parts = state["labels"], vocabulary, settings, vectors, contextual
        model = SHARINGS[settings.sharing](choose_tasks(settings.tasks), *parts)
        model.load_state_dict(state["model"])
    return model.to(device_of(settings)).eval(), vocabulary, settings

# The files of a run. All of them can be written again from checkpoint.pt and vectors.pt.
def start_run(trainer):
    """Makes the folder of a new run, and saves what its first epoch needs to be resumed."""
    if trainer.checksum:
        return
    vocabulary, model = trainer.vocabulary, trainer.model
    for task in trainer.tasks:
        scores, name = evaluate(model, vocabulary, task, task.data["dev"][:1]), task.name
        names = [n for n in model.heads[name].score_names if n in scores]
        expect(task.validation_metric_name in names, f"validation_metric_name of {name}",
               f"one of {', '.join(names)}", task.validation_metric_name)
    refuse_existing(trainer.folder)
    trainer.folder.mkdir(parents=True)
    if trainer.settings.vectors:
        words = vocabulary.words[len(vocabulary.counts):]
        write(trainer.folder / "vectors.pt", (words, model.embedder.word_vectors.frozen))
    trainer.checksum = checksum(trainer.tasks)
    print_start(trainer)
    save_run(trainer)

def refuse_existing(folder):
    expect(not Path(folder).exists(), folder, "a new folder (to go on with a run, use --resume, or "
           "train.resume(folder) in Python)", "one that exists")

def save_run(trainer):
    weights, where = trainer.model.state_dict(), f"{trainer.folder}, epoch {len(trainer.history)}"
    for name, values in weights.items():
        expect(values.isfinite().all(), where, "finite weights", f"others in {name}; checkpoint.pt "
               "keeps the epoch before")
    write(trainer.folder / "checkpoint.pt", {
        **model_state(trainer, weights), "best": trainer.best, "steps": trainer.steps,
        "history": trainer.history, "data": trainer.checksum,
        **{f"optimizer {name}": o.state_dict() for name, o in trainer.optimizers.items()},
        **{f"lr_scheduler {name}": s.state_dict() for name, s in trainer.lr_schedulers.items()}})
    write(trainer.folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in trainer.history))
    if trainer.best:
        write(trainer.folder / "model.pt", model_state(trainer, trainer.best["mean"]))

def model_state(trainer, weights):
    """Everything that prediction needs but the words that only a vector file has."""
    words, chars, counts = (getattr(trainer.vocabulary, x) for x in ("words", "chars", "counts"))
    return {"settings": asdict(trainer.settings), "model": weights,
            "labels": {name: head.labels for name, head in trainer.model.heads.items()},
            "contextual": [*trainer.model.embedder.contextual.shape],
            "vocabulary": {"words": words[:len(counts)], "chars": chars, "counts": counts}}

def checksum(tasks):
    """Of all documents of a run."""
    total = sha256()
    for document in chain(*(documents for task in tasks for documents in task.data.values())):
        total.update(repr((document.sentences, document.annotations)).encode())
    return total.hexdigest()

def write(path, content):
    """Text, or tensors and plain values. The name always holds a whole file, the old or the new."""
    temporary = path.with_name(path.name + ".tmp")
    with one_line(f"{path}: not written; earlier files of the run are intact"):
        with open(temporary, "wb") as file:          # an error if the disk is full
            file.write(content.encode()) if isinstance(content, str) else torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

def load(path):
    """Tensors and plain values, no code. zipfile compares the checksums, which torch does not."""
    with one_line(f"{path}: expected a file of train.py"), zipfile.ZipFile(path) as file:
        expect(file.testzip() is None, path, "a file of train.py", "a damaged one")
        return torch.load(path, map_location="cpu", weights_only=True)

# The screen.
def visible(text):
    """Characters that steer a screen are shown, not sent."""
    return re.sub("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]",
                  lambda match: ascii(match[0])[1:-1], text)

def print_start(trainer):
    """What is trained on what, and what of it cannot be learned."""
    settings, model = trainer.settings, trainer.model
    values = [(f, getattr(settings, f.name)) for f in fields(settings)]
    path = model.embedder.contextual.path
    print("settings:", *(f"{flag_of(f.name)} {shown(x)}" for f, x in values if x != f.default),
          *(["--features", path] if path else []))
    print("\ntask    train    dev   test             batches   share of steps")
    n_batches = trainer.n_batches()
    shares = sampling_probabilities(settings.schedule, n_batches)
    for task, n, share in zip(trainer.tasks, n_batches, shares):
        sizes = "".join(f"{len(documents):7d}" for documents in task.data.values())
        unit = "documents" if task.whole_documents else "sentences"
        print(f"{task.name:5s} {sizes}  {unit} {n:9d} {share:16.3f}")
    for task in trainer.tasks:
        lists = [rows for d in task.data["train"] for rows in d.annotations[task.annotation]]
        rows, left, why = [*chain(*lists)], 0, "overlap another"
        if task.whole_documents:
            print(f"{task.name}: {len(rows)} mentions in {len(lists)} clusters")
            left = sum(end - start >= settings.max_span for start, end in rows)
            why = f"have more than --max-span {settings.max_span} words"
        else:
            labels = Counter(label for *_, label in rows).most_common(20)
            print(f"{task.name}:", ", ".join(f"{visible(label)} {n}" for label, n in labels))
            print_unseen(task, {*task.labels("dev"), *task.labels("test")} - {*task.labels()})
        if isinstance(model.heads[task.name], Tagger):
            longest = max(map(len, task.data["train"]))
            left = len(rows) - sum(len(spans_of(tags_of(spans, longest))) for spans in lists)
        if left:
            print(f"{task.name}: not learned: {left} of {len(rows)} training spans, which {why}")
    sizes = [sum(p.numel() for p in part.parameters())
             for part in (model, model.embedder, model.encoders, model.heads)]
    print("{:,} parameters: {:,} embedder, {:,} encoders, {:,} heads".format(*sizes))
    print("\nmean loss of every epoch, and dev score (* the best so far)")

def print_unseen(task, labels):
    if labels:
        print(f"{task.name}: not in train:", visible(", ".join(sorted(labels))))

def end_epoch(trainer, seconds, n_epochs):
    """Saves the run, and prints a line."""
    save_run(trainer)
    n, line = len(trainer.history), f"epoch {len(trainer.history):3d} {seconds:6.1f} s"
    for task in trainer.tasks:
        scores = trainer.dev_scores(task)
        losses = trainer.history[-1]["loss"]               # without a task that was never drawn
        loss = f"{losses[task.name]:6.2f}" if task.name in losses else "     -"
        star = " " if epochs_waited(scores) or not any(scores) else "*"
        line += f"   {task.name} loss {loss} dev {abs(scores[-1]):5.1f}{star}"
    line += f"   at most {seconds * (n_epochs - 1):.0f} s to go" if n == 1 < n_epochs else ""
    print(line.rstrip(), flush=True)

def print_scores(columns, names):
    """A table: a column for every {name: number}, a row for every name that the first has."""
    print(" " * 24 + "".join(f"{title:>14s}" for title in columns))
    first = next(iter(columns.values()))
    for name in [name for name in names if name in first]:
        cells = [numbers.get(name, "") for numbers in columns.values()]
        cells = [f"{x:14.2f}" if isinstance(x, float) else f"{x:>14}" for x in cells]
        print(f"{visible(name):24.24s}" + "".join(cells))

def finish_run(trainer, results):
    """Writes results.json, and prints why the run ended and its scores."""
    settings, done, heads = trainer.settings, len(trainer.history), trainer.model.heads
    columns = {"own best": {}, "one model": {}, "dev": {}}
    for task in trainer.tasks:
        row, scores = results[task.name], trainer.dev_scores(task)
        row |= {"steps": trainer.steps[task.name], "best_epoch": best_epoch(scores) + 1,
                "best_dev": abs(max(scores))}                   # without the sign of `dev_scores`
        found = row["own_best"]["test"], row["one_model"]["test"], row["own_best"]["dev"]
        for column, numbers in zip(columns.values(), found):
            column |= {f"{task.name} {name}": number for name, number in numbers.items()}
    best = best_epoch(trainer.watched_scores()["mean"]) + 1
    content = {"settings": asdict(settings), "tasks": results, "one_model_epoch": best}
    write(trainer.folder / "results.json", json.dumps(content, indent=1) + "\n")

    why = f"that is the largest number of epochs (--epochs {settings.epochs})"
    if trainer.out_of_patience():
        why = f"no task has improved for {settings.patience} epochs; to go on, raise --patience"
    print(f"\nstopped at epoch {done}: {why}\n\nF1 on test in percent")
    print_scores(columns, [f"{task} {n}" for task, head in heads.items() for n in head.score_names])
    print("own best: with the weights of the epoch in which the task was best on dev, as in the "
          f"paper\none model: with the weights of epoch {best}, which has the best mean on dev; it "
          "predicts\n")
    for name, row in results.items():
        ends = row["best_epoch"] == done
        more = f"; --epochs {2 * done} may help" if not row["best_dev"] or ends else ""
        print(f"{name}: best in epoch {row['best_epoch']}, with {row['best_dev']:.2f} on dev{more}")
    command = again(trainer.folder, trainer.model.embedder.contextual.path, "--predict", "FILE")
    print(f"\nthe run lies in {trainer.folder}; it predicts with\n    {command}")

def again(folder, features, *options):
    """The command that does something else with a run."""
    given = ["--features", features] if features else []
    return shlex.join(["python", sys.argv[0], "--run", str(folder), *options, *given])

def annotated_lines(document, names):
    """The sentences with [bracketed LABEL] spans, #n for the cluster that they are in. Below each
    stand its relations, and spans that cross a shorter one. names: the annotations to show."""
    words, labels, bracketed, lines = [*chain(*document.sentences)], {}, [], []
    notes = [[] for _ in words]
    for name in names:
        lists = document.annotations[name]
        if name == "clusters":                     # numbered in the order of the text
            clusters = enumerate(sorted(map(sorted, lists)), 1)
            lists = [[(*mention, f"#{n}") for mention in cluster] for n, cluster in clusters]
        for *tokens, label in chain(*lists):
            texts = [" ".join(words[a:b + 1]) for a, b in zip(tokens[::2], tokens[1::2])]
            if len(texts) == 2:
                notes[tokens[0]].append(f"    {texts[0]} -- {label} -> {texts[1]}")
            else:
                labels.setdefault(tuple(tokens), {})[label] = texts[0]      # each label once
    start, spans = 0, sorted(labels, key=lambda span: (span[1] - span[0], span))    # shortest first
    for end in np.cumsum([*map(len, document.sentences)], dtype=int).tolist():
        for a, b in [span for span in spans if start <= span[0] < end]:
            if b >= end or any(a < c <= b < d or c < a <= d < b for c, d in bracketed):
                notes[a] += [f"    {text} {label}" for label, text in labels[a, b].items()]
            else:
                bracketed.append((a, b))
                words[a] = "[" + words[a]
                words[b] += f" {' '.join(labels[a, b])}]"
        lines += [" ".join(words[start:end]), *chain(*notes[start:end])]
        start = end
    return [visible(line) for line in lines]

# Prediction and evaluation.
def predict(model, vocabulary, paths, as_json):
    """Prints the files with all that the model finds in them. Returns how many files were bad."""
    n_bad, keys = 0, [task.annotation for task in model.tasks.values()]
    for path in paths:
        try:
            raw = suffix_of(path) not in (*JSON_SUFFIXES, ".conll", ".bio")
            documents = [read_text(path)] if raw else read_annotated(path, "ner", keys=[])
            expect(documents, path, "documents", "none")
            for document in documents:
                cut = cut_sentences(document, f"{path}, {document.key}")
                found = annotate(model, cut, vocabulary)
                lines = [to_json(found)] if as_json else annotated_lines(found, keys)
                print("\n".join(lines), flush=True)
        except InputError as error:
            report(error)
            n_bad += 1
    return n_bad

def print_evaluation(model, vocabulary, path):
    """The scores on a file, or on the test file of a folder, also for every label."""
    path = file_of(path, "test") if Path(path).is_dir() else path
    keys = [task.annotation for task in model.tasks.values()]
    annotated = {name: read_documents(path, task, keys) for name, task in model.tasks.items()}
    expect(any(annotated.values()), path, "the key of a task of the run", "none")
    for name, task in model.tasks.items():
        documents = task.data["test"] = task.examples(annotated[name])
        unit = "documents" if task.whole_documents else "sentences"
        print(f"\n{name}: {path}, {len(documents)} {unit} with the key '{task.annotation}'")
        print_unseen(task, {*task.labels("test")} - {*model.heads[name].labels})
        if documents:
            scores = evaluate(model, vocabulary, task, documents)
            counts, columns = model.metrics[name].counts, {"F1": scores}
            for title in ("precision", "recall"):
                columns[title] = {n: scores[f"{n}-{title}"] for n in counts}
            for title, i in ("predicted", 1), ("gold", 3):
                columns[title] = {n: numbers[i] for n, numbers in counts.items()}
            print_scores(columns, dict.fromkeys([*model.heads[name].score_names, *counts]))

# The command line.
class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(message)

def parse(arguments):
    """({setting: value} of those that are given, the other options)."""
    parser = Parser(description=__doc__.split("\n\nAn epoch")[0], allow_abbrev=False,
                    formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
                        prog, max_help_position=26, width=100))
    add = parser.add_argument_group("the run").add_argument
    add("--run", metavar="DIR", help="folder of the run (default: runs/<tasks>)")
    add("--resume", action="store_true", help="go on with --run; --epochs, --patience, --device "
        "and the place of --data may change")
    add("--predict", metavar="FILE", nargs="+", help="annotate .json, .jsonl, .conll, .bio files, "
        "or else raw text (-: standard input)")
    add("--evaluate", metavar="PATH", help="score an annotated file, or the test file of a folder")
    add("--features", metavar="FILE.py", default="", help="your contextual vectors: a Python file "
        "with a function features(sentences), see the README")
    add("--json", action="store_true", help="print predictions as JSON lines")
    firsts = {"tasks": "the data", "sharing": "the model", "batch_size": "the training"}
    for f in fields(Settings):
        add = parser.add_argument_group(firsts[f.name]).add_argument if f.name in firsts else add
        kind = {"nargs": "+"} if f.type is tuple else {"type": f.type}
        default = f" (default: {shown(f.default)})" if f.default not in ("", ()) else ""
        choices = f.metadata["choices"]
        metavar = None if choices else "N" if f.type in (int, float) else "VALUE"
        add(flag_of(f.name), default=argparse.SUPPRESS, choices=choices, metavar=metavar, **kind,
            help=f.metadata["help"] + default)
    options = vars(parser.parse_args(arguments))
    given = {f.name: options.pop(f.name) for f in fields(Settings) if f.name in options}
    if "tasks" in given:                                       # in the order of the hierarchy
        given["tasks"] = [task.name for task in choose_tasks(given["tasks"])]
    return {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}, options

def main(arguments=None):
    """Returns the exit status."""
    given, options = parse(arguments)
    folder, resumes, paths, annotated, features, as_json = options.values()
    predicts = paths or annotated
    expect(folder != "", "--run", "a folder", "none")
    expect(folder or not (resumes or predicts), "--resume, --predict, --evaluate", "--run", "none")
    expect(paths or not as_json, "--json", "--predict", "none")
    expect(not (resumes and predicts), "--resume", "no --predict or --evaluate", "both")
    if predicts:
        expect(given.keys() <= {"device", "threads"}, "--predict and --evaluate",
               "--device, --threads or no setting", " ".join(given))
        Settings(**given)                          # refuses bad values before any file is read
        model, vocabulary = load_run(folder, features, **given)
        n_bad = predict(model, vocabulary, paths or [], as_json)
        if annotated:
            print_evaluation(model, vocabulary, annotated)
        return 2 if n_bad else 0
    settings = Settings(**given)
    if not folder:
        settings.tasks = chosen_tasks(settings)
        name = Path("runs", "-".join(settings.tasks))
        numbered = chain([name], (Path(f"{name}-{n}") for n in count(2)))
        folder = next(folder for folder in numbered if not folder.exists())
    try:
        if resumes:
            trainer = resume(folder, features, **given)
            trainer.train(trainer.settings.epochs)
            finish_run(trainer, trainer.final_scores())
        else:
            refuse_existing(folder)
            finish_run(*run(settings, folder, features))
    except KeyboardInterrupt:
        expect(Path(folder, "checkpoint.pt").exists(), folder, "a run", "none: it was stopped")
        raise InputError(f"stopped; go on with: {again(folder, features, '--resume')}") from None
    return 0

def report(error):
    print(f"{Path(sys.argv[0]).name}: {visible(str(error)) or 'stopped'}", file=sys.stderr)

def command_line():
    """`main`, with one line for what a user can mend."""
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")     # as all files are
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:                                    # such as `| head`: no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except (InputError, KeyboardInterrupt, OSError, RuntimeError) as error:
        # NotImplementedError: an operation that the device lacks. A plain one: a fault of the code.
        if type(error) is RuntimeError and not re.search("(allocate|of) memory", str(error)):
            raise
        report(error)
        status = 2
    sys.exit(status)

if __name__ == "__main__":
    command_line()
