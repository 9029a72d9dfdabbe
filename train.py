"""Training: one task is drawn per step. Read tasks.py and hmtl.py before.

    python train.py --tasks ner rel                       # the built-in corpus
    python train.py --tasks ner rel --data DIR --vectors glove.txt
    python train.py --run runs/ner-rel --resume           # go on after any interruption
    python train.py --run runs/ner-rel --predict FILE     # raw text, or - for standard input

The algorithm of the paper is `MultiTaskTrainer.train_epoch`: draw a task with a probability
proportional to its batches, take its next batch, make one step of that task's own optimizer over
the whole model. Every task is scored on dev after every epoch, keeps its best weights, and training
ends when no task improves.

Every epoch seeds itself from (seed, epoch), a batch from (seed, task, its number). So no
generator state is saved, and a resumed run equals an uninterrupted one bit for bit (on a CPU).

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
        self.history = []             # a dict per epoch, log.jsonl; all progress follows from it

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
        for step, index in enumerate(plan):
            task = self.tasks[index]
            if self.settings.schedule == "successive" and (step == 0 or index != plan[step - 1]):
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

    def dev_scores(self, task):
        """The score that training watches, of every epoch; negated if it should decrease."""
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
        step, epoch = trainer.steps[task.name], len(trainer.history) + 1
        raise Stopped(f"{trainer.folder}: the loss or gradient of {task.name} is not finite at its "
                      f"step {step}, in epoch {epoch}; checkpoint.pt is good and holds epoch "
                      f"{epoch - 1}")

def set_anchor(trainer):
    """Remembers the shared parameters at the end of a task; there is none before the first."""
    if any(trainer.steps.values()):
        trainer.anchor = [parameter.detach().clone() for parameter in trainer.shared]

def hold_to_anchor(trainer):
    """Adds the gradient of delta |shared - anchor|^2 (Hashimoto et al. 2017, section 3)."""
    for parameter, anchor in zip(trainer.shared, trainer.anchor):
        if parameter.grad is not None:
            parameter.grad += 2 * trainer.settings.successive_delta * (parameter.detach() - anchor)

# Several processes (torchrun): all draw the same task, each takes its share; the first writes.
def processes():
    """(the number of this process, how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

def in_parallel(model):
    options = {"find_unused_parameters": True, "forward_sync_buffers": False}
    return DistributedDataParallel(model, **options) if dist.is_initialized() else model

def own_share(documents):
    return documents[processes()[0]::processes()[1]]

def weighted_share(documents):
    """This process's documents and their weight in the mean; without any, the first, with 0."""
    own = own_share(documents)
    return own or documents[:1], len(own) * processes()[1] / len(documents)

def gathered(value):
    """The value of every process."""
    values = [value] * processes()[1]
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values

def add_up_processes(metric):
    sums, metric.sums = gathered(metric.sums), {}
    for counts in sums:
        metric.add(counts)

def mean_losses(losses):
    means = gathered({name: float(torch.stack(values).mean()) for name, values in losses.items()})
    return {name: float(np.mean([row[name] for row in means])) for name in losses}

# The files of a run. The checkpoint comes last: a run killed before it repeats the epoch.
def start_run(trainer):
    """Writes what the first epoch needs to be resumed."""
    trainer.folder.mkdir(parents=True, exist_ok=True)
    if not trainer.history:
        log = trainer.folder / "log.jsonl"
        if log.exists() and log.stat().st_size:
            raise InputError(f"{trainer.folder}: holds a run; --resume it, or name another folder")
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
        "steps": trainer.steps, "history": trainer.history, "model": trainer.model.state_dict(),
        **{f"optimizer {name}": o.state_dict() for name, o in trainer.optimizers.items()},
        **{f"lr_scheduler {name}": s.state_dict() for name, s in trainer.lr_schedulers.items()}})

def restore_run(trainer, checkpoint):
    trainer.model.load_state_dict(checkpoint["model"])
    for name in trainer.optimizers:
        trainer.optimizers[name].load_state_dict(checkpoint[f"optimizer {name}"])
        trainer.lr_schedulers[name].load_state_dict(checkpoint[f"lr_scheduler {name}"])
    trainer.steps, trainer.history = checkpoint["steps"], checkpoint["history"]

def write_results(trainer):
    """Final scores, into results.json and returned: of each task's own best weights, as in the
    paper, and of the one model with the best mean, which stays loaded."""
    model, tasks = trainer.model, {}
    for task in trainer.tasks:
        scores, steps = trainer.dev_scores(task), trainer.steps[task.name]
        tasks[task.name] = {
            "steps": steps, "passes": steps / task.n_batches(trainer.settings.batch_size),
            "best_epoch": best_epoch(scores) + 1, "best_dev": max(scores), "last_dev": scores[-1]}
    gathered(None)                                   # the first process has written the weights
    for kind, name in [("own_best", "best-{}.pt"), ("one_model", "best.pt")]:
        for task in trainer.tasks:
            model.load_state_dict(load(trainer.folder / name.format(task.name), trainer.device))
            tasks[task.name][kind] = {s: trainer.evaluate(task, s) for s in ("dev", "test")}
    results = {"settings": asdict(trainer.settings), "tasks": tasks,
               "mixtures": {name: dict(zip(model.reads[name], weights.softmax(0).tolist()))
                            for name, weights in model.mixtures.items()},
               "one_model_epoch": best_epoch(trainer.mean_scores()) + 1}
    write(trainer.folder / "results.json", json.dumps(results, indent=1) + "\n")
    return results

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
        raise Stopped(f"{path}: {error!r:.200}; earlier files of the run are intact") from None

@contextmanager
def one_line(message):
    """InputError instead of the many kinds of errors that damaged or foreign files raise."""
    try:
        yield
    except Exception as error:
        found = getattr(error, "strerror", None) or repr(error)
        raise InputError(f"{message}: {found[:200]}") from None

def load(path, device="cpu"):
    """Tensors and plain values, no code. zipfile compares the checksums, which torch does not."""
    with one_line(f"{path}: expected a checkpoint of train.py"), zipfile.ZipFile(path) as file:
        if file.testzip():
            raise ValueError("checksum")
        return torch.load(path, map_location=device, weights_only=True)

def new_folder(tasks):
    """runs/<tasks>, with a numeric suffix if that folder already exists."""
    name = Path("runs", "-".join(tasks))
    names = chain([name], (Path(f"{name}-{n}") for n in count(2)))
    return next(name for name in names if not name.exists())

def lock(folder):
    """Refuses a second process in a folder while the result is kept; the system unlocks at exit."""
    folder.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(folder / "lock", timeout=0, isolation_level=None)
    with one_line(f"{folder}: another process trains there"):
        connection.execute("BEGIN EXCLUSIVE")            # SQLite can lock on every system
    return connection

# The screen.
def show_progress(text):
    """A status line, overwritten by the next one; shown only on a terminal."""
    if sys.stderr.isatty() and processes()[0] == 0:
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

def print_epoch(trainer, seconds):
    show_progress("")
    line = f"epoch {len(trainer.history):3d}  {seconds:5.1f} s "
    for task in trainer.tasks:
        scores = trainer.dev_scores(task)
        star = "*" if any(scores) and epochs_waited(scores) == 0 else " "
        line += f"  {task.name} {scores[-1]:5.1f}{star}"
    print(line, flush=True)

def print_start(trainer):
    """The settings, the sizes of the data and the model, what is not learned."""
    settings, model = trainer.settings, trainer.model
    print(", ".join(f"{name} {shown(value)}" for name, value in asdict(settings).items()))
    print("\ntask    train    dev   test             batches   share of steps")
    n_batches = [task.n_batches(settings.batch_size) for task in trainer.tasks]
    shares = sampling_probabilities(settings.schedule, n_batches)
    for task, n, share in zip(trainer.tasks, n_batches, shares):
        sizes = "".join(f"{len(documents):7d}" for documents in task.data.values())
        unit = "documents" if task.whole_documents else "sentences"
        print(f"{task.name:5s} {sizes}  {unit} {n:9d} {share:16.3f}")
    for task in trainer.tasks:
        rows = [row for d in task.data["train"] for row in d.annotations[task.annotation]]
        left, total, why = 0, sum(map(len, rows)), "overlap a longer one"
        if HEADS[task.name] is Tagger:
            left = total - sum(len(outermost(spans)) for spans in rows)
        elif task.whole_documents:
            left = sum(end - start >= settings.max_span for row in rows for start, end in row)
            why = f"have more than --max-span {settings.max_span} words"
        if left:
            print(f"{task.name}: not learned: {left} of {total} training spans, which {why}")
    parts = model.embedder, model.encoders, model.heads, model
    sizes = [sum(p.numel() for p in part.parameters()) for part in parts]
    print("parameters: {:,} embedder, {:,} encoders, {:,} heads, {:,} in all".format(*sizes))
    print(f"run folder: {trainer.folder}\n\ndev scores, * where they are the best so far")

def print_results(trainer, results):
    print("\nF1 on test in percent: of each task's own best weights, and of the one model with the "
          f"best mean on dev (epoch {results['one_model_epoch']})\n\n"
          "task   score        own best   one model   own best on dev")
    for name, row in results["tasks"].items():
        own, one, dev = row["own_best"]["test"], row["one_model"]["test"], row["own_best"]["dev"]
        for score in [s for s in own if not s.endswith(("recall", "precision"))]:
            print(f"{name:6s} {score:11s} {own[score]:9.2f} {one[score]:11.2f} "
                  f"{dev.get(score, np.nan):17.2f}")
    print()
    for name, row in results["tasks"].items():
        print("{}: best at epoch {best_epoch} of {}, dev {best_dev:.2f} then and {last_dev:.2f} at "
              "the end; {steps} steps, {passes:.1f} passes over its data".format(
                  name, len(trainer.history), **row))
    for name, weights in results["mixtures"].items():
        print(f"{name} reads " + ", ".join(f"{w:.2f} {encoder}" for encoder, w in weights.items()))

def print_examples(trainer):
    """Two short dev documents of every task, as predicted; the key too if that is wrong."""
    trainer.model.eval()
    for task in trainer.tasks:
        print(f"\n{task.name}, dev")
        names, dev = [task.annotation], task.data["dev"]
        for document in [d for d in dev if any(d.annotations[names[0]]) and len(d) < 100][:2]:
            batch = make_batch([document], trainer.vocabulary).to(trainer.device)
            found = annotated_lines(annotate(trainer.model, document, batch), names)
            key = annotated_lines(document, names)
            versions = {"right": key} if found == key else {"wrong": found, "key": key}
            for mark, lines in versions.items():
                print(f"{mark:>7s}  " + "\n         ".join(lines))

def annotated_lines(document, names):
    """The sentences with [bracketed LABEL] spans, #n for the clusters they are in; below each its
    relations, and spans that cross a bracketed one. names: the annotations to show."""
    words = [word for sentence in document.sentences for word in sentence]
    labels, notes = {}, [[] for _ in words]              # notes: below the sentence of the token

    def text(start, end):
        return " ".join(words[start:end + 1])
    for name in names:
        lists = document.annotations[name]
        if name == "clusters":                           # numbered in the order of the text
            clusters = enumerate(sorted(map(sorted, lists)), 1)
            lists = [[(*span, f"#{i}") for span in cluster] for i, cluster in clusters]
        for start, end, *to, label in sorted(chain.from_iterable(lists)):
            if to:
                notes[start].append(f"    {text(start, end)} -- {label} -> {text(*to)}")
            else:
                labels.setdefault((start, end), []).append(label)
    opened, closed, ends = Counter(), [""] * len(words), []      # ends: of brackets that are open
    for start, end in sorted(labels, key=lambda span: (span[0], -span[1])):
        label = " ".join(dict.fromkeys(labels[start, end]))
        ends = [last for last in ends if last >= start]
        if ends and ends[-1] < end:
            notes[start].append(f"    {text(start, end)} {label}")
        else:
            ends.append(end)
            opened[start] += 1
            closed[end] = f" {label}]" + closed[end]
    lines, start = [], 0
    for sentence in document.sentences:
        tokens = range(start, start + len(sentence))
        lines.append(" ".join("[" * opened[t] + words[t] + closed[t] for t in tokens))
        lines += chain.from_iterable(notes[t] for t in tokens)
        start += len(sentence)
    return lines

# A model from settings.
def build(settings, checkpoint=None):
    """(tasks with data, vocabulary, model); a checkpoint's data must still be the same."""
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
    expect(known or not words, settings.vectors, "words of the training documents", "none")
    found = {"labels": labels, "vocabulary": vocabulary.state()}
    same = not checkpoint or all(checkpoint.get(name) == found[name] for name in found)
    expect(same, "--resume", "the run's training data and vectors", "others")
    return tasks, vocabulary, HMTL(tasks, labels, vocabulary, settings, vectors).to(device)

def data_folders(data, tasks):
    """{task name: folder} from --data DIR, or --data TASK=DIR ...; {} without data."""
    names, folders = [task.name for task in tasks], {}
    for item in sorted(data, key=lambda item: "=" in item):      # what is for all tasks first
        name, equals, folder = item.partition("=")
        expect(not equals or name in names, "--data", f"one of the tasks {', '.join(names)}", name)
        folders |= {name: folder} if equals else dict.fromkeys(names, item)
    for name in names:
        expect(name in folders or not data, "--data", f"a folder for the task {name}", "none")
    return folders

def device_of(name):
    """The device of that name, or a GPU where there is one; under torchrun a GPU per process."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    with one_line(f"--device {name}"):
        return torch.zeros(0, device=name).device        # an error if there is no such device

def predict(folder, path, as_json, device):
    """Prints the text or the .json or .jsonl documents at path, with all that best.pt finds."""
    checkpoint, weights = load(folder / "checkpoint.pt"), load(folder / "best.pt")
    with one_line(f"{folder}: expected checkpoints of train.py"):
        settings = Settings(**checkpoint["settings"])
        check_settings(settings)
        vocabulary = Vocabulary(**checkpoint["vocabulary"])
        model = HMTL(choose_tasks(settings.tasks), checkpoint["labels"], vocabulary, settings)
        model.load_state_dict(weights)
    model.to(device).eval()
    for document in read_json(path) if path.endswith((".json", ".jsonl")) else [read_text(path)]:
        expect(len(document), f"{path}, {document.key}", "some words", "none")
        found = annotate(model, document, make_batch([document], vocabulary).to(device))
        print(to_json(found) if as_json else "\n".join(annotated_lines(found, found.annotations)))

# The command line.
FLAGS = {f.name: "--" + f.name.replace("_", "-") for f in fields(Settings)}
CHOICES = {"tasks": HIERARCHY, "schedule": ["proportional", "uniform", "successive"],
           "sharing": ["hierarchical", "flat", "inverted", "latent"]}
LIMITS = {"dropout": (0, 0.99), "unknown": (0, 1), "seed": (0, 2 ** 63 - 1), "rare": (0, 1e9),
          "lr_patience": (0, 1e9), "successive_delta": (0, 1e9)}       # all others: above 0

def check_settings(settings):
    """Refuses values that no model can be built from."""
    for f in fields(settings):
        value = getattr(settings, f.name)
        low, high = LIMITS.get(f.name, (1 if f.type is int else 1e-9, 1e9))
        good, expected = True, f"a value of type {f.type.__name__}"
        if not isinstance(value, (int, float) if f.type is float else f.type):
            good = False
        elif f.name in CHOICES:
            chosen, choices = {*value} if f.type is tuple else {value}, CHOICES[f.name]
            good, expected = chosen and chosen <= {*choices}, f"one of {', '.join(choices)}"
        elif f.name.endswith("encoder"):
            good, expected = re.fullmatch(r"[1-9]\d*x[1-9]\d*", value), "LAYERSxUNITS, as in 2x64"
        elif f.type in (int, float):
            good, expected = low <= value <= high, f"a number from {low:g} to {high:g}"
        expect(good, FLAGS[f.name], expected, shown(value))

def shown(value):
    return (" ".join(value) if isinstance(value, tuple) else str(value)) or "none"

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(message)

def parse(arguments):
    """({setting: value} of those that are given, [--run, --resume, --predict, --json])."""
    parser = Parser(description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--run", metavar="DIR", type=Path, help="folder of the run")
    add("--resume", action="store_true",
        help="go on with the run in --run; --epochs, --patience and --device may change")
    add("--predict", metavar="FILE", help="annotate raw text (-: standard input), .json or .jsonl")
    add("--json", action="store_true", help="predict JSON lines")
    helps = dict(re.findall(r"^    (\w+): .*# (.+)", inspect.getsource(Settings), re.M))
    for f in fields(Settings):
        kind = {"nargs": "+"} if f.type is tuple else {"type": f.type}
        add(FLAGS[f.name], default=argparse.SUPPRESS, choices=CHOICES.get(f.name), **kind,
            help=f"{helps[f.name]} (default: {shown(f.default)})")
    given = vars(parser.parse_args(arguments))
    other = [given.pop(name) for name in ("run", "resume", "predict", "json")]
    if "tasks" in given:                                       # in the order of the hierarchy
        given["tasks"] = [task.name for task in choose_tasks(given["tasks"])]
    return {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}, other

def main(arguments=None):
    given, (folder, resume, text, as_json) = parse(arguments)
    expect(folder or not (resume or text), "--resume and --predict", "--run DIR", "none")
    expect(text or not as_json, "--json", "--predict", "none")
    if text:
        expect(given.keys() <= {"device"}, "--predict", "--device or no setting", " ".join(given))
        predict(folder, text, as_json, device_of(given.get("device")))
    elif resume:
        checkpoint = load(folder / "checkpoint.pt")
        run(resumed_settings(given, checkpoint, folder), folder, checkpoint)
    else:
        folder = folder or new_folder(given.get("tasks", Settings.tasks))
        expect(not (folder / "checkpoint.pt").exists(), folder, "no run, or --resume", "a run")
        run(Settings(**given), folder)

def resumed_settings(given, checkpoint, folder):
    """The run's own, but for those that may change."""
    with one_line(f"{folder}: expected a checkpoint of train.py"):
        stored = asdict(Settings(**checkpoint["settings"]))
    for name, value in given.items():
        expect(value == stored[name] or name in ("epochs", "patience", "device"), FLAGS[name],
               f"{shown(stored[name])}, as in the run", shown(value))
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
    held = lock(folder) if processes()[0] == 0 else None
    if not held:
        sys.stdout = open(os.devnull, "w")
    if checkpoint:
        with one_line(f"{folder}: expected a checkpoint of train.py"):
            restore_run(trainer, checkpoint)
    print_start(trainer)
    try:
        trainer.train(settings.epochs)
        print_results(trainer, write_results(trainer))
        print_examples(trainer)
    except KeyboardInterrupt:
        raise Stopped(f"stopped; go on with: python train.py --run {folder} --resume") from None
    if held:
        held.close()
    if dist.is_initialized():
        dist.barrier()               # a process that leaves before the others may abort, in gloo
        dist.destroy_process_group()

def command_line():
    """`main`, with one line for what a user can mend."""
    sys.stdout.reconfigure(errors="replace")                   # screens that lack a character
    try:
        main()
    except (InputError, Stopped, KeyboardInterrupt, OSError) as error:
        show_progress("")
        print(f"train.py: {str(error) or 'stopped'}", file=sys.stderr)
        sys.exit(2)

if __name__ == "__main__":
    command_line()
