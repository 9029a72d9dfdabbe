"""Training: one task is drawn per step. Read tasks.py and hmtl.py before.

    python train.py --tasks ner rel                       # the built-in corpus
    python train.py --tasks ner rel --data DIR --vectors glove.txt
    python train.py --run runs/ner-rel --resume           # go on after any interruption
    python train.py --run runs/ner-rel --predict FILE     # raw text, or - for standard input

The algorithm of the paper is `MultiTaskTrainer.train_epoch`: draw a task with a probability
proportional to its batches, take its next batch, make one step of that task's own optimizer over
the whole model. Every task is scored on dev after every epoch, keeps its best weights, and training
ends when no task improves.

Every epoch seeds itself from (seed, epoch), and batch number n of a task is a function of (seed,
n). So no generator state is saved, and a resumed run equals an uninterrupted one bit for bit (on a
CPU, with as many threads).

Left out for the reader's sake, and found below the banner: several processes, files, the screen,
prediction, the command line.
"""

import argparse
import inspect
import json
import os
import re
import sqlite3
import sys
import time
import zipfile
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, fields
from itertools import chain, count
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import ReduceLROnPlateau

from hmtl import HEADS, HIERARCHY, HMTL, Settings, Tagger, annotate
from tasks import (InputError, Vocabulary, choose_tasks, expect, make_batch, outermost,
                   read_json, read_text, read_vectors, to_json)


# ------------------------------------------------------------------------------- which task next

def sampling_probabilities(schedule, n_batches):
    """p_task = batches of the task / batches of all tasks; or the same for all."""
    shares = np.array(n_batches) if schedule != "uniform" else np.ones(len(n_batches))
    return shares / shares.sum()


def choose_task(sampling_prob, rng):
    """The index of the task to train next: one multinomial draw from a numpy generator."""
    draw = rng.multinomial(1, sampling_prob)                     # such as [0, 1, 0]
    return int(np.argmax(draw))


def plan_epoch(schedule, n_batches, rng):
    """The index of the task of every step of an epoch: as many steps as there are batches in all.

    proportional  drawn in proportion to the tasks' batches (the paper)
    uniform       drawn evenly
    successive    one task after the other, the lowest first (Hashimoto et al. 2017); the trainer
                  then holds the shared parameters near their values at the end of the task before
    """
    if schedule == "successive":
        return [task for task, n in enumerate(n_batches) for _ in range(n)]
    sampling_prob = sampling_probabilities(schedule, n_batches)
    return [choose_task(sampling_prob, rng) for _ in range(sum(n_batches))]


# --------------------------------------------------------------------------------- when to stop

def best_epoch(scores):
    """The index of the best of a list of scores, the first of equals."""
    return scores.index(max(scores))


def epochs_waited(scores):
    """Epochs since the best score. While a task's score is still 0 its patience is not used up."""
    if not any(scores):
        return 0
    return len(scores) - 1 - best_epoch(scores)


# ------------------------------------------------------------------------------------ the trainer

class MultiTaskTrainer:
    """Trains an HMTL model on several tasks, and keeps the run in a folder."""

    def __init__(self, model, tasks, vocabulary, settings, folder):
        self.model = model
        self.tasks = tasks
        self.vocabulary = vocabulary
        self.settings = settings
        self.folder = Path(folder)
        self.device = next(model.parameters()).device
        self.parallel = in_parallel(model)          # the model itself if there is one process
        # One Adam per task, each over the whole model: it divides by the size of that task's own
        # gradients, so no task needs a weight for its loss.
        self.optimizers = {task.name: torch.optim.Adam(model.parameters(), settings.lr, fused=True)
                           for task in tasks}
        # The plateau rule: halve a task's rate after more than lr_patience epochs without a best.
        self.lr_schedulers = {name: ReduceLROnPlateau(optimizer, "max", factor=0.5, threshold=0,
                                                      patience=settings.lr_patience)
                              for name, optimizer in self.optimizers.items()}
        self.shared = [*model.embedder.parameters(), *model.encoders.parameters()]
        self.anchor = None            # the shared parameters at the end of the task before
        self.steps = {task.name: 0 for task in tasks}
        self.history = []             # a dict per epoch, the lines of log.jsonl

    def train(self, n_epochs):
        """Trains until epoch n_epochs, or until every task has run out of patience."""
        start_run(self)
        while len(self.history) < n_epochs and not self.finished():
            started = time.time()
            rates = {name: o.param_groups[0]["lr"] for name, o in self.optimizers.items()}
            loss = self.train_epoch(len(self.history))
            dev = {task.name: self.evaluate(task, "dev") for task in self.tasks}
            self.history.append({"epoch": len(self.history) + 1, "steps": dict(self.steps),
                                 "loss": loss, "dev": dev, "lr": rates})
            for task in self.tasks:
                scores = self.dev_scores(task)
                if any(scores):                     # while it is still 0 it keeps its rate
                    self.lr_schedulers[task.name].step(scores[-1])
            save_run(self)
            print_epoch(self, time.time() - started)

    def train_epoch(self, epoch):
        """As many steps as there are training batches in all. Returns {drawn task: mean loss}."""
        rng = np.random.default_rng([self.settings.seed, epoch])
        torch.manual_seed(int(rng.integers(2 ** 63)) + processes()[0])
        n_batches = [task.n_batches(self.settings.batch_size) for task in self.tasks]
        plan = plan_epoch(self.settings.schedule, n_batches, rng)
        losses = {}
        self.model.train()
        for step, number in enumerate(plan):
            task = self.tasks[number]
            if self.settings.schedule == "successive" and (step == 0 or number != plan[step - 1]):
                set_anchor(self)
            losses.setdefault(task.name, []).append(self.train_step(task))
            show_progress(f"epoch {epoch + 1}: step {step + 1} of {len(plan)}")
        return mean_losses(losses)

    def train_step(self, task):
        """One step on the task's next batch; the loss, as a tensor."""
        # The next batch, or this process's share of it.
        documents = task.batch(self.steps[task.name], self.settings.batch_size, self.settings.seed)
        self.steps[task.name] += 1
        documents, weight = weighted_share(documents)          # weight 1 in a single process
        batch = make_batch(documents, self.vocabulary).to(self.device)

        # Its gradient, no longer than `clip`.
        self.model.zero_grad()               # to None: Adam skips what the task does not use
        loss = self.parallel(task.name, batch)["loss"] * weight
        loss.backward()
        if self.anchor:
            hold_to_anchor(self)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        refuse_non_finite(self, task, loss, norm)

        # One step of the task's own optimizer.
        self.optimizers[task.name].step()
        return loss.detach()

    def evaluate(self, task, split):
        """The scores of one task on its dev or test documents."""
        self.model.eval()
        documents = own_share(sorted(task.data[split], key=len))
        size = task.batch_size(self.settings.batch_size)
        for i in range(0, len(documents), size):
            batch = make_batch(documents[i:i + size], self.vocabulary)
            self.model(task.name, batch.to(self.device))
        add_up_processes(self.model.metrics[task.name])
        return self.model.get_metrics(task.name, reset=True)

    # The history answers every question about progress, so nothing else about it is kept.

    def dev_scores(self, task):
        """The score that training watches, of every epoch; negative if it should decrease."""
        sign = -1 if task.validation_metric_decreases else 1
        return [sign * row["dev"][task.name][task.validation_metric_name] for row in self.history]

    def mean_scores(self):
        scores = [self.dev_scores(task) for task in self.tasks]
        return [sum(row) / len(row) for row in zip(*scores)]

    def finished(self):
        waited = [epochs_waited(self.dev_scores(task)) for task in self.tasks]
        return bool(self.history) and min(waited) >= self.settings.patience


# ================================================================================================
# Skip this on a first reading: the practical side.
# ================================================================================================

class Stopped(Exception):
    """Why a run stopped early, in one line."""


def refuse_non_finite(trainer, task, loss, norm):
    """Stops the run before a step that would spoil the weights."""
    if not (loss + norm).isfinite():
        raise Stopped(f"{trainer.folder}: the loss or gradient of {task.name} is not finite at its "
                      f"step {trainer.steps[task.name]}, in epoch {len(trainer.history) + 1}; "
                      f"checkpoint.pt is good and holds epoch {len(trainer.history)}")


def set_anchor(trainer):
    """Remembers the shared parameters at the end of a task; there is none before the first."""
    if any(trainer.steps.values()):
        trainer.anchor = [parameter.detach().clone() for parameter in trainer.shared]


def hold_to_anchor(trainer):
    """Successive regularization (Hashimoto et al. 2017, section 3): adds the gradient of
    delta |shared parameters - anchor|^2."""
    for parameter, anchor in zip(trainer.shared, trainer.anchor):
        if parameter.grad is not None:
            parameter.grad += 2 * trainer.settings.successive_delta * (parameter.detach() - anchor)


# Several processes, started by torchrun: all draw the same task, each takes its share of the batch;
# the first alone writes and prints.

def processes():
    """(the number of this process, how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def in_parallel(model):
    if not dist.is_initialized():
        return model
    return DistributedDataParallel(model, find_unused_parameters=True, forward_sync_buffers=False)


def own_share(documents):
    number, n = processes()
    return documents[number::n]


def weighted_share(documents):
    """This process's documents, and the weight of their loss in the mean over the processes. A
    process without any takes the first, with weight 0."""
    own = own_share(documents)
    return own or documents[:1], len(own) * processes()[1] / len(documents)


def gathered(value):
    """The value of every process."""
    values = [value] * processes()[1]
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def add_up_processes(metric):
    sums = gathered(metric.sums)
    metric.sums = {}
    for counts in sums:
        metric.add(counts)


def mean_losses(losses):
    means = gathered({name: float(torch.stack(values).mean()) for name, values in losses.items()})
    return {name: float(np.mean([row[name] for row in means])) for name in losses}


# The files of a run. The checkpoint is written last: a run that is killed before that repeats the
# epoch and writes the same (on a CPU; a GPU may round differently).

def start_run(trainer):
    """Writes what the first epoch needs to be resumed."""
    log = trainer.folder / "log.jsonl"
    if not trainer.history and log.exists() and log.stat().st_size:
        raise InputError(f"{trainer.folder}: holds a run; restore it, or name another folder")
    trainer.folder.mkdir(parents=True, exist_ok=True)
    if not trainer.history:
        save_run(trainer)


def save_run(trainer):
    scores = {f"best-{task.name}.pt": trainer.dev_scores(task) for task in trainer.tasks}
    for name, values in (scores | {"best.pt": trainer.mean_scores()}).items():
        if values and best_epoch(values) == len(values) - 1:
            write(trainer.folder / name, trainer.model.state_dict())
    write(trainer.folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in trainer.history))
    write(trainer.folder / "checkpoint.pt", {
        "settings": asdict(trainer.settings), "vocabulary": trainer.vocabulary.state(),
        "labels": {task.name: task.labels() for task in trainer.tasks},
        "steps": trainer.steps, "history": trainer.history,
        **{name: part.state_dict() for name, part in stateful(trainer)}})


def restore_run(trainer, checkpoint):
    for name, part in stateful(trainer):
        part.load_state_dict(checkpoint[name])
    trainer.steps, trainer.history = checkpoint["steps"], checkpoint["history"]


def stateful(trainer):
    """What a checkpoint holds the state of, with names."""
    yield "model", trainer.model
    for name in trainer.optimizers:
        yield f"optimizer {name}", trainer.optimizers[name]
        yield f"lr_scheduler {name}", trainer.lr_schedulers[name]


def write_results(trainer):
    """Final scores, into results.json and returned: of each task's own best weights, as in the
    paper, and of the one model with the best mean, which stays loaded."""
    results = {"settings": asdict(trainer.settings), "tasks": {}, "mixtures": {},
               "one_model_epoch": best_epoch(trainer.mean_scores()) + 1}
    for task in trainer.tasks:
        scores, steps = trainer.dev_scores(task), trainer.steps[task.name]
        results["tasks"][task.name] = {
            "steps": steps, "passes": steps / task.n_batches(trainer.settings.batch_size),
            "best_epoch": best_epoch(scores) + 1, "best_dev": max(scores), "last_dev": scores[-1],
            "own_best": scores_of(trainer, f"best-{task.name}.pt", task)}
    for task in trainer.tasks:
        results["tasks"][task.name]["one_model"] = scores_of(trainer, "best.pt", task)
    for name, weights in trainer.model.mixtures.items():
        encoders = trainer.model.reads[name]
        results["mixtures"][name] = dict(zip(encoders, weights.softmax(0).tolist()))
    write(trainer.folder / "results.json", json.dumps(results, indent=1) + "\n")
    return results


def scores_of(trainer, name, task):
    """{split: the task's scores} of the weights in a file of the run."""
    gathered(None)                                   # the first process has written the file
    trainer.model.load_state_dict(load(trainer.folder / name, trainer.device))
    return {split: trainer.evaluate(task, split) for split in ("dev", "test")}


def write(path, content):
    """Text, or tensors and plain values. The name always holds a whole file, the old or the new."""
    if processes()[0] > 0:
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode()) if isinstance(content, str) else torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:         # a full disk; torch makes it a RuntimeError
        temporary.unlink(missing_ok=True)
        raise Stopped(f"{path}: {first_line(error)}; earlier files of the run are intact") from None


@contextmanager
def expecting_a_checkpoint(path):
    """One line instead of the many kinds of errors that damaged or foreign files raise."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except Exception as error:
        raise InputError(f"{path}: expected a checkpoint of train.py, found a damaged or other "
                         f"file ({type(error).__name__})") from None


def load(path, device="cpu"):
    """Tensors and plain values; weights_only: a file cannot run code. torch writes a zip file but
    does not compare its checksums; zipfile does, so no flipped bit passes."""
    with expecting_a_checkpoint(path):
        with zipfile.ZipFile(path) as file:
            if file.testzip():
                raise ValueError("checksum")
        return torch.load(path, map_location=device, weights_only=True)


def new_folder(tasks):
    """runs/<tasks>, with a numeric suffix if that folder already exists."""
    name = "-".join(tasks)
    names = chain([name], (f"{name}-{n}" for n in count(2)))
    return next(Path("runs") / name for name in names if not (Path("runs") / name).exists())


def lock(folder):
    """Refuses a second process in a run folder, as long as the result is kept. SQLite locks on every
    system, and the system unlocks when the process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(folder / "lock", timeout=0, isolation_level=None)
    try:
        connection.execute("BEGIN EXCLUSIVE")
    except sqlite3.Error as error:
        raise InputError(f"{folder}: another process trains there ({error})") from None
    return connection


# ------------------------------------------------------------------------------------- the screen

def show_progress(text):
    """A status line, overwritten by the next one; shown only on a terminal."""
    if sys.stderr.isatty() and processes()[0] == 0:
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def print_epoch(trainer, seconds):
    show_progress("")
    print(f"epoch {len(trainer.history):3d}  {seconds:5.1f} s ", end="")
    for task in trainer.tasks:
        scores = trainer.dev_scores(task)
        star = "*" if any(scores) and epochs_waited(scores) == 0 else " "
        print(f"  {task.name} {scores[-1]:5.1f}{star}", end="")
    print(flush=True)


def print_start(trainer):
    """The settings, the sizes of the data and the model, what is not learned."""
    settings, model = trainer.settings, trainer.model
    print(", ".join(f"{name} {shown(value)}" for name, value in asdict(settings).items()) + "\n")
    n_batches = [task.n_batches(settings.batch_size) for task in trainer.tasks]
    probabilities = sampling_probabilities(settings.schedule, n_batches)
    print("task    train    dev   test             batches   share of steps")
    for task, n, p in zip(trainer.tasks, n_batches, probabilities):
        sizes = "".join(f"{len(documents):7d}" for documents in task.data.values())
        unit = "documents" if task.whole_documents else "sentences"
        print(f"{task.name:5s} {sizes}  {unit} {n:9d} {p:16.3f}")
    for task in trainer.tasks:
        rows = [row for d in task.data["train"] for row in d.annotations[task.annotation]]
        left, reason = 0, "overlap a longer one"
        if HEADS[task.name] is Tagger:
            left = sum(len(spans) - len(outermost(spans)) for spans in rows)
        elif task.whole_documents:
            left = sum(end - start >= settings.max_span for row in rows for start, end in row)
            reason = f"have more than --max-span {settings.max_span} words"
        if left:
            print(f"{task.name}: not learned: {left} of {sum(map(len, rows))} training spans, "
                  f"which {reason}")
    sizes = [sum(p.numel() for p in part.parameters()) for part in
             (model.embedder, model.encoders, model.heads, model)]
    print("parameters: {:,} embedder, {:,} encoders, {:,} heads, {:,} in all".format(*sizes))
    print(f"run folder: {trainer.folder}\n\ndev scores, * where they are the best so far")


def print_results(trainer, results):
    print(f"\nF1 on test in percent: of each task's own best weights, and of the one model with "
          f"the best mean on dev (epoch {results['one_model_epoch']})\n\n"
          "task   score        own best   one model   own best on dev")
    for name, row in results["tasks"].items():
        own, one, dev = row["own_best"]["test"], row["one_model"]["test"], row["own_best"]["dev"]
        for score in [s for s in own if not s.endswith(("recall", "precision"))]:
            print(f"{name:6s} {score:11s} {own[score]:9.2f}  {one[score]:10.2f}  "
                  f"{dev.get(score, np.nan):16.2f}")
    print()
    for name, row in results["tasks"].items():
        print(f"{name}: best at epoch {row['best_epoch']} of {len(trainer.history)}, dev "
              f"{row['best_dev']:.2f} then and {row['last_dev']:.2f} at the end; {row['steps']} steps, "
              f"{row['passes']:.1f} passes over its data")
    for name, weights in results["mixtures"].items():
        print(f"{name} reads " + ", ".join(f"{w:.2f} {encoder}" for encoder, w in weights.items()))


def print_examples(trainer, n=2):
    """A few short dev documents of every task, as predicted; the key too if that is wrong."""
    trainer.model.eval()
    for task in trainer.tasks:
        print(f"\n{task.name}, dev")
        documents = [d for d in task.data["dev"] if any(d.annotations[task.annotation])]
        for document in [d for d in documents if len(d) < 100][:n]:
            batch = make_batch([document], trainer.vocabulary).to(trainer.device)
            found = annotate(trainer.model, document, batch)
            found, key = [annotated_lines(d, [task.annotation]) for d in (found, document)]
            versions = {"right": key} if found == key else {"wrong": found, "key": key}
            for mark, lines in versions.items():
                print(f"{mark:>7s}  " + "\n         ".join(lines))


def annotated_lines(document, names):
    """The sentences with [bracketed LABEL] spans, #n for the clusters they are in; below each its
    relations, and spans that cross a bracketed one. names: the annotations to show."""
    words = [word for sentence in document.sentences for word in sentence]
    notes = [[] for _ in words]                      # below the sentence of the token
    labels = {}

    def text(start, end):
        return " ".join(words[start:end + 1])
    for name in names:
        lists = document.annotations[name]
        if name == "clusters":                       # numbered in the order of the text
            lists = [[(*span, f"#{i}") for span in cluster] for i, cluster
                     in enumerate(sorted(sorted(cluster) for cluster in lists), 1)]
        for row in sorted(chain.from_iterable(lists)):
            if len(row) == 5:
                a, b, c, d, label = row
                notes[a].append(f"    {text(a, b)} -- {label} -> {text(c, d)}")
            else:
                labels.setdefault(row[:2], []).append(row[2])
    opened, closed, ends = Counter(), Counter(), []
    for start, end in sorted(labels, key=lambda span: (span[0], -span[1])):
        label = " ".join(dict.fromkeys(labels[start, end]))
        ends = [last for last in ends if last >= start]          # of the brackets that are open
        if ends and ends[-1] < end:
            notes[start].append(f"    {text(start, end)} {label}")
        else:
            ends.append(end)
            opened[start] += 1
            closed[end] = f" {label}]" + (closed[end] or "")
    lines, start = [], 0
    for sentence in document.sentences:
        tokens = range(start, start + len(sentence))
        lines.append(" ".join("[" * opened[t] + words[t] + (closed[t] or "") for t in tokens))
        lines += chain.from_iterable(notes[t] for t in tokens)
        start += len(sentence)
    return lines


# -------------------------------------------------------------------------- a model from settings

def build(settings, checkpoint=None):
    """(tasks with data, vocabulary, model) of a run's settings, on its device. With a checkpoint,
    the data must give the same labels and vocabulary."""
    check_settings(settings)
    tasks, device = choose_tasks(settings.tasks), device_of(settings.device)
    folders = data_folders(settings.data, tasks)
    for task in tasks:
        task.load_data(folders.get(task.name), settings.max_tokens)
    labels = {task.name: task.labels() for task in tasks}
    torch.manual_seed(settings.seed)
    words, vectors = [], None
    if settings.vectors:
        words, values = vectors = read_vectors(settings.vectors)
        settings.word_dim = values.shape[1]              # the file's width wins
    vocabulary = Vocabulary.from_documents([d for t in tasks for d in t.data["train"]], words)
    known = {*words} & {*vocabulary.words[:len(vocabulary.counts)]}
    expect(known or not words, settings.vectors, "vectors of words of the training documents",
           "none")
    state = {"labels": labels, "vocabulary": vocabulary.state()}
    if checkpoint and any(checkpoint[name] != value for name, value in state.items()):
        raise InputError("--resume: expected the run's training data and vectors, found others")
    return tasks, vocabulary, HMTL(tasks, labels, vocabulary, settings, vectors).to(device)


def data_folders(data, tasks):
    """{task name: folder} from --data DIR, or --data TASK=DIR ...; {} without data."""
    names, folders = [task.name for task in tasks], {}
    for item in sorted(data, key=lambda item: "=" in item):      # what is for all tasks first
        name, equals, folder = item.partition("=")
        expect(not equals or name in names, f"--data {item}",
               f"one of the tasks {', '.join(names)} before the =", name)
        folders |= {name: folder} if equals else dict.fromkeys(names, item)
    for name in names:
        expect(name in folders or not data, "--data", f"a folder for the task {name}", "none")
    return folders


def device_of(name):
    """The device of that name, or a GPU where there is one; under torchrun a GPU per process."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        return torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError) as error:      # no such device, or torch without it
        raise InputError(f"--device {name}: {first_line(error)}") from None


def first_line(error):
    return str(error).splitlines()[0][:200]


def predict(folder, path, as_json, device):
    """Prints the raw text at path, or its documents if it ends in .json or .jsonl, with everything
    that a run's one model finds."""
    checkpoint, weights = load(folder / "checkpoint.pt"), load(folder / "best.pt")
    with expecting_a_checkpoint(folder / "checkpoint.pt"):
        settings = Settings(**checkpoint["settings"])
        vocabulary = Vocabulary(**checkpoint["vocabulary"])
        model = HMTL(choose_tasks(settings.tasks), checkpoint["labels"], vocabulary, settings)
    with expecting_a_checkpoint(folder / "best.pt"):
        model.load_state_dict(weights)
    model.to(device).eval()
    for document in read_json(path) if path.endswith((".json", ".jsonl")) else [read_text(path)]:
        expect(len(document), f"{path}, {document.key}", "some words", "none")
        found = annotate(model, document, make_batch([document], vocabulary).to(device))
        lines = [to_json(found)] if as_json else annotated_lines(found, found.annotations)
        print(*lines, sep="\n")


# ------------------------------------------------------------------------------- the command line

CHOICES = {"tasks": HIERARCHY, "schedule": ["proportional", "uniform", "successive"],
           "sharing": ["hierarchical", "flat", "inverted", "latent"]}
LIMITS = {"dropout": (0, 0.99), "unknown": (0, 1), "seed": (0, 2 ** 63 - 1), "rare": (0, 1e9),
          "lr_patience": (0, 1e9), "successive_delta": (0, 1e9)}         # all others: above 0


def check_settings(settings):
    """Refuses values that no model can be built from."""
    for f in fields(settings):
        value, where = getattr(settings, f.name), flag(f.name)
        low, high = LIMITS.get(f.name, (1e-12, 1e9))
        types = (int, float) if f.type is float else f.type
        expect(isinstance(value, types), where, f"a value of type {f.type.__name__}", str(value))
        if f.name in CHOICES:
            values = {*value} if f.type is tuple else {value}
            expect(values and values <= {*CHOICES[f.name]}, where,
                   "one of " + ", ".join(CHOICES[f.name]), shown(value))
        elif f.name.endswith("encoder"):
            expect(re.fullmatch(r"[1-9]\d*x[1-9]\d*", value), where,
                   "LAYERSxUNITS, such as 2x64", value)
        elif f.type in (int, float):
            expect(low <= value <= high, where, f"a number from {low:g} to {high:g}", str(value))


def flag(name):
    return "--" + name.replace("_", "-")


def shown(value):
    """A setting as it is printed."""
    return (" ".join(value) if isinstance(value, tuple) else str(value)) or "none"


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(message)


def parse(arguments):
    """(settings given on the command line as a dict, other arguments)."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", metavar="DIR", type=Path, help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --run")
    parser.add_argument("--predict", metavar="FILE",
                        help="annotate raw text, - for standard input; or .json, .jsonl documents")
    parser.add_argument("--json", action="store_true", help="predict JSON lines")
    # The help of a setting is the comment of its field.
    comments = dict(re.findall(r"^    (\w+): .*# (.+)", inspect.getsource(Settings), re.M))
    for f in fields(Settings):
        many = {"nargs": "+"} if f.type is tuple else {"type": f.type}
        parser.add_argument(flag(f.name), default=argparse.SUPPRESS, **many,
                            choices=CHOICES.get(f.name),
                            help=f"{comments[f.name]} (default: {shown(f.default)})")
    given = vars(parser.parse_args(arguments))
    other = argparse.Namespace(**{k: given.pop(k) for k in ("run", "resume", "predict", "json")})
    if "tasks" in given:                                       # in the order of the hierarchy
        given["tasks"] = [task.name for task in choose_tasks(given["tasks"])]
    return {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}, other


def main(arguments=None):
    given, other = parse(arguments)
    if (other.resume or other.predict) and not other.run:
        raise InputError("--resume and --predict need --run DIR")
    if other.json and not other.predict:
        raise InputError("--json needs --predict")
    if other.predict and given.keys() - {"device"}:
        raise InputError("--predict takes the run's settings; only --device may be given")
    if other.predict:
        predict(other.run, other.predict, other.json, device_of(given.get("device")))
    elif other.resume:
        checkpoint = load(other.run / "checkpoint.pt")
        run(resumed_settings(given, checkpoint, other.run), other.run, checkpoint)
    else:
        folder = other.run or new_folder(given.get("tasks", Settings.tasks))
        if (folder / "checkpoint.pt").exists():
            raise InputError(f"{folder}: holds a run; go on with --resume, or name another folder")
        run(Settings(**given), folder)


def resumed_settings(given, checkpoint, folder):
    """The run's own, but for those that may change."""
    with expecting_a_checkpoint(folder / "checkpoint.pt"):
        stored = asdict(Settings(**checkpoint["settings"]))
    for name, value in given.items():
        expect(value == stored[name] or name in ("epochs", "patience", "device"), flag(name),
               f"{shown(stored[name])} (a run keeps all but --epochs, --patience and --device)",
               shown(value))
    return Settings(**stored | given)


def run(settings, folder, checkpoint=None):
    """Trains, or trains on, and prints the results."""
    if "LOCAL_RANK" in os.environ:                             # started by torchrun
        device = device_of(settings.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        folder = gathered(folder)[0]
    tasks, vocabulary, model = build(settings, checkpoint)
    trainer = MultiTaskTrainer(model, tasks, vocabulary, settings, folder)
    if processes()[0] == 0:
        held = lock(folder)                                    # until this function returns
    else:
        sys.stdout = open(os.devnull, "w")
    if checkpoint:
        with expecting_a_checkpoint(folder / "checkpoint.pt"):
            restore_run(trainer, checkpoint)
    print_start(trainer)
    try:
        trainer.train(settings.epochs)
        print_results(trainer, write_results(trainer))
        print_examples(trainer)
    except KeyboardInterrupt:
        raise Stopped(f"stopped; go on with: python train.py --run {folder} --resume") from None
    if dist.is_initialized():
        dist.barrier()               # a process that leaves before the others may abort, in gloo
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")                   # screens that lack a character
    try:
        main()
    except (InputError, Stopped, KeyboardInterrupt, OSError) as error:
        show_progress("")
        print(f"train.py: {str(error) or 'stopped'}", file=sys.stderr)
        sys.exit(2)
