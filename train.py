"""Training: one task is drawn per step. Read tasks.py and hmtl.py before.

    python train.py --tasks ner rel                       # the built-in corpus
    python train.py --tasks ner rel --data DIR --vectors glove.txt
    python train.py --run runs/ner-rel --resume           # go on after any interruption
    python train.py --run runs/ner-rel --predict FILE     # raw text, or - for standard input

The algorithm of the paper is `MultiTaskTrainer.train_epoch`: draw a task with a probability
proportional to its batches (`choose_task`), take its next batch, one step of that task's own
optimizer over the whole model. After every epoch every task is scored on its dev documents; the
best weights of each task, and of the best mean, are kept; training ends when no task improves.

A run is a function of its settings: every epoch seeds itself from (seed, epoch), and batch number
n of a task is a function of (seed, n), `Task.batch`. So the checkpoint needs no generator states,
and a resumed run equals an uninterrupted one bit for bit (on a CPU, with as many threads).
"""

import argparse
import inspect
import io
import json
import math
import os
import re
import sqlite3
import sys
import textwrap
import time
import zipfile
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from hmtl import HIERARCHY, HMTL, Settings, outermost
from tasks import (InputError, Vocabulary, expect, make_batch, read_json, read_text, read_vectors,
                   tasks_in_order)


# ------------------------------------------------------------------------------- which task next

def sampling_probabilities(schedule, n_batches):
    """Probability of each task; n_batches: training batches of each."""
    shares = np.array([1] * len(n_batches) if schedule == "uniform" else n_batches, float)
    return shares / shares.sum()


def choose_task(sampling_prob, rng):
    """The number of the task to train next: one multinomial draw from a numpy generator."""
    return int(np.argmax(rng.multinomial(1, sampling_prob)))


def plan_epoch(schedule, n_batches, rng):
    """The number of the task of every step of an epoch: as many steps as there are batches in all.

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

def best_epoch(scores, decreases=False):
    """The index of the best of a list of scores, the first of equals."""
    return min(range(len(scores)), key=lambda i: scores[i] if decreases else -scores[i])


def epochs_waited(scores, decreases=False):
    """Epochs since the best score. A task that has scored nothing yet has not taken off: its
    patience does not run."""
    if not any(scores):
        return 0
    return len(scores) - 1 - best_epoch(scores, decreases)


# ------------------------------------------------------------------------------------ the trainer

class Stopped(Exception):
    """Why a run stopped early, in one line."""


class MultiTaskTrainer:
    """Trains an HMTL model on several tasks, and keeps the run in a folder.

    Under torchrun every process draws the same task and takes its share of the batch; the first
    one writes.
    """

    def __init__(self, model, tasks, vocabulary, settings, folder):
        self.model, self.tasks, self.vocabulary = model, tasks, vocabulary
        self.settings, self.folder = settings, Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.device = next(model.parameters()).device
        self.rank, self.n_processes = 0, 1
        self.parallel = model
        if dist.is_initialized():
            self.rank, self.n_processes = dist.get_rank(), dist.get_world_size()
            self.parallel = DistributedDataParallel(model, find_unused_parameters=True,
                                                    forward_sync_buffers=False)
        # One optimizer per task, each over the whole model: Adam divides by the size of a task's
        # own gradients, so that no task needs a weight for its loss.
        self.optimizers = {task.name: torch.optim.Adam(model.parameters(), settings.lr, fused=True)
                           for task in tasks}
        self.lr_schedulers = {task.name: torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizers[task.name], "min" if task.validation_metric_decreases else "max",
            factor=0.5, patience=settings.lr_patience, threshold=0)
            for task in tasks}
        self.shared = [*model.embedder.parameters(), *model.encoders.parameters()]
        self.before = None            # the shared parameters at the end of the task before
        self.steps = {task.name: 0 for task in tasks}
        self.history = []             # per epoch: {"epoch", "loss", "dev", ...}; log.jsonl's lines

    def train(self, n_epochs):
        """Trains until epoch number n_epochs, or until every task's patience is at its end."""
        log = self.folder / "log.jsonl"
        if not self.history and log.exists() and log.stat().st_size:
            raise InputError(f"{self.folder}: holds a run; restore it, or name another folder")
        if self.rank == 0:
            if self.history:         # the run may have been killed before it wrote its log
                self.write_log()
            else:                    # so that the first epoch can be resumed
                self.save()
        while len(self.history) < n_epochs and not self.finished():
            started = time.time()
            losses = self.train_epoch(len(self.history))
            dev = {task.name: self.evaluate(task, "dev") for task in self.tasks}
            self.history.append({
                "epoch": len(self.history) + 1, "steps": dict(self.steps),
                "loss": losses, "dev": dev,
                "lr": {name: o.param_groups[0]["lr"] for name, o in self.optimizers.items()}})
            for task in self.tasks:
                if any(self.dev_scores(task)):       # a task that has not taken off keeps its rate
                    self.lr_schedulers[task.name].step(self.dev_scores(task)[-1])
            if self.rank == 0:
                self.save()
            self.print_epoch(time.time() - started)

    def train_epoch(self, epoch):
        """As many steps as there are training batches in all. Returns {drawn task: mean loss}."""
        settings = self.settings
        rng = np.random.default_rng([settings.seed, epoch])
        torch.manual_seed(int(rng.integers(2 ** 63)) + self.rank)
        n_batches = [task.n_batches(settings.batch_size) for task in self.tasks]
        plan = plan_epoch(settings.schedule, n_batches, rng)
        losses = {task.name: [] for task in self.tasks}
        self.model.train()
        for step, number in enumerate(plan):
            turned = step == 0 or number != plan[step - 1]
            if settings.schedule == "successive" and turned and any(self.steps.values()):
                self.before = [p.detach().clone() for p in self.shared]
            task = self.tasks[number]
            losses[task.name].append(self.train_step(task))
            if step % 20 == 0 or step == len(plan) - 1:
                self.check(losses, epoch)
                progress(f"epoch {epoch + 1}: step {step + 1} of {len(plan)}")
        drawn = [name for name in losses if losses[name]]
        means = torch.stack([torch.stack(losses[name]).mean() for name in drawn])
        if self.n_processes > 1:
            dist.all_reduce(means)
        return dict(zip(drawn, (means / self.n_processes).tolist()))

    def train_step(self, task):
        """One step on the task's next batch; the loss, as a tensor."""
        documents = task.batch(self.steps[task.name], self.settings.batch_size, self.settings.seed)
        self.steps[task.name] += 1
        # Gradients are averaged over processes: each weighs its loss with its share of the batch,
        # 0 where there were fewer documents than processes.
        mine = documents[self.rank::self.n_processes]
        weight = len(mine) * self.n_processes / len(documents)
        batch = make_batch(mine or documents[:1], self.vocabulary).to(self.device)
        loss = self.parallel(task.name, batch)["loss"] * weight
        self.model.zero_grad()
        loss.backward()
        if self.before is not None:
            self.hold_back()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimizers[task.name].step()
        return loss.detach() + 0 * norm              # not finite where the gradient is not

    def hold_back(self):
        """Successive regularization (Hashimoto et al. 2017, section 3): adds the gradient of
        delta * |shared parameters - their values after the task before|^2."""
        for parameter, before in zip(self.shared, self.before):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - before,
                                    alpha=2 * self.settings.successive_delta)

    def check(self, losses, epoch):
        """Stops the run where a loss is not finite. Called now and then: a GPU waits for it."""
        for name, values in losses.items():
            bad = (~torch.stack(values).isfinite()).nonzero() if values else []
            if len(bad):
                step = self.steps[name] - len(values) + int(bad[0]) + 1
                raise Stopped(f"{self.folder}: the loss or gradient of {name} is not finite at its "
                              f"step {step}, in epoch {epoch + 1}; checkpoint.pt is good and holds "
                              f"epoch {len(self.history)}")

    def evaluate(self, task, split):
        """The scores of one task on its dev or test documents."""
        self.model.eval()
        documents = sorted(task.data[split], key=lambda d: sum(map(len, d.sentences)))
        documents = documents[self.rank::self.n_processes]
        size = task.batch_size(self.settings.batch_size)
        for i in range(0, len(documents), size):
            batch = make_batch(documents[i:i + size], self.vocabulary).to(self.device)
            self.model(task.name, batch)
        if self.n_processes > 1:                     # every process scored its share
            metric = self.model.metrics[task.name]
            sums = metric.sums.to(self.device)
            dist.all_reduce(sums)
            metric.sums = sums.cpu()
        return self.model.get_metrics(task.name, reset=True)

    # The history answers every question about progress, so nothing else about it is kept.

    def dev_scores(self, task):
        return [row["dev"][task.name][task.validation_metric_name] for row in self.history]

    def mean_scores(self):
        """Per epoch, the mean of the tasks' dev scores; what decreases counts negative."""
        signs = [-1 if task.validation_metric_decreases else 1 for task in self.tasks]
        return np.mean([sign * np.array(self.dev_scores(task))
                        for sign, task in zip(signs, self.tasks)], axis=0).tolist()

    def finished(self):
        return bool(self.history) and all(
            epochs_waited(self.dev_scores(task), task.validation_metric_decreases)
            >= self.settings.patience for task in self.tasks)

    def print_epoch(self, seconds):
        cells = []
        for task in self.tasks:
            scores = self.dev_scores(task)
            best = (any(scores) and best_epoch(scores, task.validation_metric_decreases)
                    == len(scores) - 1)
            cells.append(f"{task.name} {scores[-1]:5.1f}{'*' if best else ' '}")
        progress("")
        print(f"epoch {len(self.history):3d}  {seconds:5.1f} s   " + "  ".join(cells), flush=True)

    # What a run leaves on disk. The best weights are written before the checkpoint: a run that is
    # killed between the two trains the epoch again and writes the same (on a CPU; a GPU may round
    # its sums differently).

    def save(self):
        weights = self.model.state_dict()
        scores = {f"best-{task.name}.pt": (self.dev_scores(task), task.validation_metric_decreases)
                  for task in self.tasks} | {"best.pt": (self.mean_scores(), False)}
        for name, (values, decreases) in scores.items():
            if self.history and best_epoch(values, decreases) == len(self.history) - 1:
                write(self.folder / name, weights)
        labels = {task.name: task.labels() for task in self.tasks}
        write(self.folder / "checkpoint.pt", {
            "settings": asdict(self.settings), "labels": labels,
            "vocabulary": self.vocabulary.state(), "model": weights, "steps": self.steps,
            "optimizers": {name: x.state_dict() for name, x in self.optimizers.items()},
            "lr_schedulers": {name: x.state_dict() for name, x in self.lr_schedulers.items()},
            "history": self.history})
        self.write_log()

    def write_log(self):
        write(self.folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in self.history))

    def restore(self, checkpoint):
        self.model.load_state_dict(checkpoint["model"])
        for name in self.optimizers:
            self.optimizers[name].load_state_dict(checkpoint["optimizers"][name])
            self.lr_schedulers[name].load_state_dict(checkpoint["lr_schedulers"][name])
        self.steps, self.history = checkpoint["steps"], checkpoint["history"]

    def results(self):
        """Final dev and test scores: each task from its own best weights, as in the paper, and all
        from the one model with the best mean. Written to results.json. The latter stays loaded:
        to train on, `restore` first."""
        results = {"settings": asdict(self.settings), "tasks": {}}
        if self.n_processes > 1:
            dist.barrier()                           # the first process has written the weights
        for task in self.tasks:
            self.load_weights(f"best-{task.name}.pt")
            scores = self.dev_scores(task)
            best = best_epoch(scores, task.validation_metric_decreases)
            results["tasks"][task.name] = {
                "steps": self.steps[task.name],
                "passes": self.steps[task.name] / task.n_batches(self.settings.batch_size),
                "best_epoch": best + 1, "best_dev": scores[best], "last_dev": scores[-1],
                "own_best": {s: self.evaluate(task, s) for s in ("dev", "test")}}
        self.load_weights("best.pt")
        results["one_model_epoch"] = best_epoch(self.mean_scores()) + 1
        for task in self.tasks:
            results["tasks"][task.name]["one_model"] = {s: self.evaluate(task, s)
                                                        for s in ("dev", "test")}
        results["mixtures"] = {name: dict(zip(self.model.reads[name], weights.softmax(0).tolist()))
                               for name, weights in self.model.mixtures.items()}
        if self.rank == 0:
            write(self.folder / "results.json", json.dumps(results, indent=1) + "\n")
        return results

    def load_weights(self, name):
        self.model.load_state_dict(load(self.folder / name, self.device))


# ---------------------------------------------------------------------------------- on the screen

def progress(text):
    """A line that the next one replaces, where somebody watches."""
    if sys.stderr.isatty() and os.environ.get("RANK", "0") == "0":
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def print_tasks(tasks, settings):
    n_batches = [task.n_batches(settings.batch_size) for task in tasks]
    print("task    train    dev   test             batches   share of steps")
    for task, n, p in zip(tasks, n_batches, sampling_probabilities(settings.schedule, n_batches)):
        sizes = "".join(f"{len(task.data[s]):7d}" for s in ("train", "dev", "test"))
        unit = "documents" if task.whole_documents else "sentences"
        print(f"{task.name:5s} {sizes}  {unit} {n:9d} {p:16.3f}")
    for task in tasks:
        rows = [row for d in task.data["train"] for row in getattr(d, task.annotation)]
        left, reason = 0, ""
        if task.annotation in ("ner", "emd"):
            left = sum(len(spans) - len(outermost(spans)) for spans in rows)
            reason = "overlap a longer one"
        elif task.annotation == "clusters":
            left = sum(end - start >= settings.max_span for row in rows for start, end in row)
            reason = f"have more than --max-span {settings.max_span} words"
        if task.n_cut:
            print(f"{task.name}: cut: {task.n_cut} training documents longer than --max-tokens "
                  f"{settings.max_tokens}")
        if left:
            print(f"{task.name}: not learned: {left} of {sum(map(len, rows))} training spans, "
                  f"which {reason}")


def print_results(trainer, results):
    print(f"\nF1 on test in percent: of each task's own best weights, and of the one model with "
          f"the best mean on dev (epoch {results['one_model_epoch']})\n")
    print("task   score        own best   one model   own best on dev")
    for name, row in results["tasks"].items():
        own, one, dev = row["own_best"]["test"], row["one_model"]["test"], row["own_best"]["dev"]
        for score in [s for s in own if not s.endswith(("recall", "precision"))]:
            print(f"{name:6s} {score:11s} {own[score]:9.2f}  {one[score]:10.2f}  "
                  f"{dev.get(score, math.nan):16.2f}")
    print("\ntask     steps  passes over   best    dev then   dev at   dev scores over the epochs\n"
          "                 its data   epoch               the end")
    for task in trainer.tasks:
        row = results["tasks"][task.name]
        print(f"{task.name:5s} {row['steps']:8d} {row['passes']:12.1f} {row['best_epoch']:6d} "
              f"{row['best_dev']:11.2f} {row['last_dev']:8.2f}   "
              f"{sparkline(trainer.dev_scores(task))}")
    for name, weights in results["mixtures"].items():
        print(f"{name} reads " + ", ".join(f"{w:.2f} {encoder}" for encoder, w in weights.items()))


def sparkline(values, width=60):
    """Values in 0 to 100 as a row of blocks, at most width of them."""
    shown = np.linspace(0, len(values) - 1, min(len(values), width)).round().astype(int)
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(values[i] / 12.5))] for i in shown)


def print_examples(model, tasks, vocabulary, device, n=2):
    """A few short dev documents of every task: what was found, wrong and missed. Of relations
    those are found whose arguments the tagger found too, as `boundaries` counts them."""
    model.eval()
    for task in tasks:
        print(f"\n{task.name}, dev: + right, ! wrong, - missed")
        annotated = [d for d in task.data["dev"] if any(getattr(d, task.annotation))
                     and sum(map(len, d.sentences)) < 100]
        for document in annotated[:n]:
            words = [w for s in document.sentences for w in s]
            found = model.annotate(document, make_batch([document], vocabulary).to(device))
            rows = [getattr(d, task.annotation) for d in (found, document)]
            rows = rows if task.whole_documents else [r[0] for r in rows]
            found, gold = [{identity(task, row): row for row in r} for r in rows]
            print("  " + " ".join(words))
            for mark, keys, source in [("+", found.keys() & gold.keys(), gold),
                                       ("!", found.keys() - gold.keys(), found),
                                       ("-", gold.keys() - found.keys(), gold)]:
                for key in sorted(keys, key=str):
                    print(f"    {mark} {in_words(task.name, source[key], words)}")


def identity(task, row):
    """What a predicted row must share with a gold one to be right."""
    if task.whole_documents:
        return frozenset(map(tuple, row))
    return (row[1], row[3], row[4]) if task.name == "rel" else tuple(row)


def in_words(name, row, words):
    def text(start, end):
        return " ".join(words[start:end + 1])
    if name == "coref":
        return "{" + ", ".join(text(*span) for span in row) + "}"
    if name == "rel":
        return f"{text(*row[:2])} -- {row[4]} -> {text(*row[2:4])}"
    return f"{text(*row[:2])} {row[2]}"


def print_annotated(document):
    """Text with [bracketed LABEL] spans, #n for the clusters they are in, and relations below."""
    labels = {}
    for rows in (document.ner or []) + (document.emd or []):
        for start, end, label in rows:
            labels.setdefault((start, end), []).append(label)
    for i, cluster in enumerate(document.clusters or [], 1):
        for span in cluster:
            labels.setdefault(span, []).append(f"#{i}")
    words, offset = [w for s in document.sentences for w in s], 0
    for sentence, relations in zip(document.sentences,
                                   document.relations or [[]] * len(document.sentences)):
        pieces = []
        for t, word in enumerate(sentence, offset):
            opened = sum(start == t for start, _ in labels)
            closed = [" ".join(["", *dict.fromkeys(labels[s])]) + "]"
                      for s in sorted(labels, key=lambda s: -s[0]) if s[1] == t]
            pieces.append("[" * opened + word + "".join(closed))
        print(" ".join(pieces))
        for row in relations:
            print("    " + in_words("rel", row, words))
        offset += len(sentence)


# ----------------------------------------------------------------------------------- runs on disk

def write(path, content):
    """Text, or tensors and plain values. The name always holds a whole file: the old or the new."""
    if isinstance(content, str):
        content = content.encode()
    else:
        buffer = io.BytesIO()
        torch.save(content, buffer)
        content = buffer.getvalue()
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:                       # a full disk
        temporary.unlink(missing_ok=True)
        raise Stopped(f"{path}: {error.strerror}; what the run wrote before is whole") from None


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
    """Tensors and plain values; weights_only: a file cannot run code. torch writes a zip file and
    does not look at its checksums when it reads it; so that no flipped bit passes, zipfile does."""
    with expecting_a_checkpoint(path):
        with zipfile.ZipFile(path) as file:
            if file.testzip():
                raise ValueError("checksum")
        return torch.load(path, map_location=device, weights_only=True)


def new_folder(tasks):
    """runs/<tasks>, with a number behind where that exists."""
    name = Path("runs") / "-".join(tasks)
    folder, n = name, 1
    while folder.exists():
        n += 1
        folder = name.with_name(f"{name.name}-{n}")
    return folder


def lock(folder):
    """Refuses a second process in a run folder; the lock holds as long as the result is kept.
    SQLite locks files on every system, and the system unlocks them when the process ends, however
    it ends."""
    connection = sqlite3.connect(folder / "lock", timeout=0, isolation_level=None)
    try:
        connection.execute("BEGIN EXCLUSIVE")
    except sqlite3.Error as error:
        reason = "another process trains there" if "locked" in str(error) else f"lock: {error}"
        raise InputError(f"{folder}: {reason}") from None
    return connection


def data_folders(data, tasks):
    """{task name: folder or None} from --data DIR, or --data TASK=DIR ..."""
    folders = dict.fromkeys((task.name for task in tasks), None)
    for item in sorted(data, key=lambda item: "=" in item):      # what is for all tasks first
        name, equals, folder = item.partition("=")
        if not equals:
            folders = dict.fromkeys(folders, item)
        elif name in folders:
            folders[name] = folder
        else:
            raise InputError(f"--data {item}: expected one of the tasks {', '.join(folders)} "
                             f"before the =, found {name}")
    missing = [name for name, folder in folders.items() if data and folder is None]
    if missing:
        raise InputError(f"--data: expected a folder for the task {missing[0]}, found none")
    return folders


def chosen_tasks(names):
    return [task for task in tasks_in_order() if task.name in names]


def device_of(name):
    """The device of that name, or a GPU where there is one; under torchrun a GPU per process."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        return torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError) as error:      # no such device, or torch without it
        raise InputError(f"--device {name}: {str(error).splitlines()[0][:200]}") from None


def build(settings, checkpoint=None):
    """(tasks with data, vocabulary, model) of a run's settings, on its device. With a checkpoint,
    the data must give the same labels and vocabulary."""
    check_settings(settings)
    tasks, device = chosen_tasks(settings.tasks), device_of(settings.device)
    folders = data_folders(settings.data, tasks)
    for task in tasks:
        task.load_data(folders[task.name], settings.max_tokens)
    labels = {task.name: task.labels() for task in tasks}
    torch.manual_seed(settings.seed)
    vectors = read_vectors(settings.vectors) if settings.vectors else None
    if vectors:
        settings.word_dim = vectors[1].shape[1]          # the file's width wins
    vocabulary = Vocabulary.of([d for task in tasks for d in task.data["train"]],
                               vectors[0] if vectors else ())
    if vectors:
        expect({*vectors[0]} & {*vocabulary.words[:len(vocabulary.counts)]}, settings.vectors,
               "vectors of words of the training documents", "none")
    if checkpoint and (labels != checkpoint["labels"]
                       or vocabulary.state() != checkpoint["vocabulary"]):
        raise InputError("--resume: expected the run's training data and vectors, found others")
    return tasks, vocabulary, HMTL(tasks, labels, vocabulary, settings, vectors).to(device)


def predict(folder, path, as_json, device):
    """Prints the raw text at path, or its documents if it ends in .json or .jsonl, with everything
    that a run's one model finds."""
    checkpoint, weights = load(folder / "checkpoint.pt"), load(folder / "best.pt")
    with expecting_a_checkpoint(folder / "checkpoint.pt"):
        settings = Settings(**checkpoint["settings"])
        vocabulary = Vocabulary(**checkpoint["vocabulary"])
        model = HMTL(chosen_tasks(settings.tasks), checkpoint["labels"], vocabulary, settings)
    with expecting_a_checkpoint(folder / "best.pt"):
        model.load_state_dict(weights)
    model.to(device).eval()
    for document in read_json(path) if path.endswith((".json", ".jsonl")) else [read_text(path)]:
        expect(any(document.sentences), f"{path}, {document.key}", "some words", "none")
        document = model.annotate(document, make_batch([document], vocabulary).to(device))
        if as_json:
            print(document.to_json())
        else:
            print_annotated(document)


# ------------------------------------------------------------------------------- the command line

CHOICES = {"tasks": list(HIERARCHY), "schedule": ["proportional", "uniform", "successive"],
           "sharing": ["hierarchical", "flat", "inverted", "latent"]}


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
    comments = dict(re.findall(r"^    (\w+): .*# (.+)", inspect.getsource(Settings), re.M))
    for f in fields(Settings):
        many = {"nargs": "+"} if f.type is tuple else {"type": f.type}
        parser.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, **many,
                            choices=CHOICES.get(f.name),
                            help=f"{comments[f.name]} (default: {in_one(f.default)})")
    given = vars(parser.parse_args(arguments))
    other = argparse.Namespace(**{k: given.pop(k) for k in ("run", "resume", "predict", "json")})
    if "tasks" in given:                                       # in the order of the hierarchy
        given["tasks"] = [name for name in HIERARCHY if name in given["tasks"]]
    return {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}, other


def in_one(value):
    """A setting as it is printed."""
    return (" ".join(value) if isinstance(value, tuple) else str(value)) or "none"


def check_settings(settings):
    """Refuses values that no model can be built from."""
    for f in fields(settings):
        value, flag = getattr(settings, f.name), "--" + f.name.replace("_", "-")
        if not isinstance(value, (int, float) if f.type is float else f.type):
            good, expected = False, f"a value of type {f.type.__name__}"
        elif f.name in CHOICES:
            values = value if f.type is tuple else [value]
            good = values and {*values} <= {*CHOICES[f.name]}
            expected = "one of " + ", ".join(CHOICES[f.name])
        elif f.name.endswith("_encoder"):
            good, expected = re.fullmatch(r"[1-9]\d*x[1-9]\d*", value), "LAYERSxUNITS, such as 2x64"
        elif f.name == "dropout":
            good, expected = 0 <= value < 1, "a share from 0 to below 1"
        elif f.name == "unknown":
            good, expected = 0 <= value <= 1, "a share from 0 to 1"
        elif f.name in ("seed", "lr_patience", "successive_delta", "rare"):
            good, expected = 0 <= value < 2 ** 63, "a number from 0 up to 2^63"
        elif f.type in (int, float):
            good, expected = 0 < value < 2 ** 63, "a number above 0, up to 2^63"
        else:
            continue
        if not good:
            raise InputError(f"{flag}: expected {expected}, found {value}")


def main(arguments=None):
    given, other = parse(arguments)
    if (other.resume or other.predict) and not other.run:
        raise InputError("--resume and --predict need --run DIR")
    if other.json and not other.predict:
        raise InputError("--json needs --predict")
    if other.predict and given.keys() - {"device"}:
        raise InputError("--predict takes the run's settings; only --device may be given")
    if other.predict:
        return predict(other.run, other.predict, other.json, device_of(given.get("device")))

    checkpoint, folder = None, other.run
    if other.resume:
        path = folder / "checkpoint.pt"
        checkpoint = load(path)
        with expecting_a_checkpoint(path):
            stored = asdict(Settings(**checkpoint["settings"]))
        for name, value in given.items():
            if value != stored[name] and name not in ("epochs", "patience", "device"):
                flag = "--" + name.replace("_", "-")
                raise InputError(f"{flag}: a run keeps its settings but --epochs, --patience and "
                                 f"--device; expected {in_one(stored[name])}, found "
                                 f"{in_one(value)}")
        settings = Settings(**stored | given)
    else:
        settings = Settings(**given)
        folder = folder or new_folder(settings.tasks)
        if (folder / "checkpoint.pt").exists():
            raise InputError(f"{folder}: holds a run; go on with --resume, or name another folder")
    if "LOCAL_RANK" in os.environ:                             # started by torchrun
        device = device_of(settings.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        names = [folder]
        dist.broadcast_object_list(names)
        folder = names[0]
    tasks, vocabulary, model = build(settings, checkpoint)
    trainer = MultiTaskTrainer(model, tasks, vocabulary, settings, folder)
    if trainer.rank == 0:
        held = lock(folder)                                    # until main returns
    else:
        sys.stdout = open(os.devnull, "w")                     # one process speaks
    if checkpoint:
        with expecting_a_checkpoint(path):
            trainer.restore(checkpoint)
    values = ", ".join(f"{k} {in_one(v)}" for k, v in asdict(settings).items())
    print(textwrap.fill(values, 100) + "\n")
    print_tasks(tasks, settings)
    parameters = [sum(p.numel() for p in part.parameters()) for part in
                  (model.embedder, model.encoders, model.heads, model)]
    print("parameters: {:,} embedder, {:,} encoders, {:,} heads, {:,} in all".format(*parameters))
    print(f"run folder: {folder}\n\ndev scores, * where they are the best so far")
    try:
        trainer.train(settings.epochs)
        print_results(trainer, trainer.results())
        print_examples(model, tasks, vocabulary, trainer.device)
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
        progress("")
        print(f"train.py: {str(error) or 'stopped'}", file=sys.stderr)
        sys.exit(2)
