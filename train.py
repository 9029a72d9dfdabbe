"""Training: one task is drawn per step. Read tasks.py and hmtl.py before.

    python train.py --tasks ner rel                       # the built-in corpus
    python train.py --tasks ner rel --data DIR --vectors glove.txt
    python train.py --run runs/ner-rel --resume           # go on after any interruption
    python train.py --run runs/ner-rel --predict FILE     # raw text, or - for standard input

The algorithm of the paper is `MultiTaskTrainer.train_epoch`: draw a task with a probability
proportional to its batches, take its next batch, make one step of that task's own optimizer over
the whole model. Every task is scored on dev after every epoch, keeps its best weights, and training
ends when no task improves.

Every epoch seeds itself from (seed, epoch), the order of a task's batches from (seed, task, pass
over its data). So no generator state is saved, and a resumed run equals an uninterrupted one bit
for bit (on a CPU).

Left out for the reader's sake, below the banner: processes, files, the screen, the command line.
"""

import argparse
import inspect
import json
import os
import re
import shlex
import sqlite3
import sys
import time
import zipfile
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, fields
from hashlib import sha256
from itertools import chain, count
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn, optim

from hmtl import (HIERARCHY, HMTL, QuestionHead, Settings, SpanQuestions, Tagger, annotate,
                  argument_tagger)
from tasks import (JSON_SUFFIXES, ContextualVectors, Document, InputError, Vocabulary, choose_tasks,
                   cut_documents, cut_sentences, expect, file_of, label_errors, label_scores,
                   make_batch, one_line, outermost, read_annotated, read_documents, read_text,
                   read_vectors, suffix_of, tags_of, to_json)

# ------------------------------------------------------------------------------- which task next

def sampling_probabilities(schedule, n_batches):
    """p_task = batches of the task / batches of all tasks; or the same for all."""
    shares = np.ones(len(n_batches)) if schedule == "uniform" else np.array(n_batches)
    return shares / shares.sum()

def choose_task(sampling_prob, rng):
    """The index of the task to train next: one multinomial draw from a numpy generator."""
    draw = rng.multinomial(1, sampling_prob)                     # such as [0, 1, 0]
    return int(draw.argmax())

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
    return len(scores) - 1 - best_epoch(scores) if any(scores) else 0

# ------------------------------------------------------------------------------------ the trainer

def evaluate(model, vocabulary, task, documents, size=32):
    """The scores of one task on documents that carry its annotation."""
    model.eval()
    model.get_metrics(task.name, reset=True)                     # forgets what was scored before
    documents = own_share(sorted(documents, key=len))            # all, in a single process
    size = task.documents_per_batch(size)
    for i in range(0, len(documents), size):
        batch = make_batch(documents[i:i + size], vocabulary).to(model.device())
        model(task.name, batch)                                  # adds to its metric
    add_up_processes(model.metrics[task.name])                   # nothing, in a single process
    return model.get_metrics(task.name)

class MultiTaskTrainer:
    """Trains an HMTL model on several tasks, and keeps the run in a folder."""

    def __init__(self, model, tasks, vocabulary, settings, folder):
        self.model = model
        self.tasks = tasks
        self.vocabulary = vocabulary
        self.settings = settings
        self.folder = Path(folder)
        # One Adam per task, each over the whole model: it divides by the size of that task's own
        # gradients, so no task needs a weight for its loss.
        self.optimizers = {task.name: optim.Adam(model.parameters(), settings.lr, fused=True)
                           for task in tasks}
        # The plateau rule: halve a task's rate after more than lr_patience epochs without a best.
        self.lr_schedulers = {
            name: optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", factor=0.5, threshold=0,
                                                       patience=settings.lr_patience)
            for name, optimizer in self.optimizers.items()}
        self.shared = shared_parameters(model)
        self.anchor = None            # if "successive": these at the end of the task before
        self.steps = {task.name: 0 for task in tasks}
        self.history = []             # a dict per epoch, as in log.jsonl: best and stop follow
        self.checksums = checksums(tasks)

    def train(self, n_epochs):
        """Trains until epoch n_epochs, or until every task has run out of patience."""
        self.n_epochs = n_epochs
        with locked(self.folder):
            start_run(self)
            while len(self.history) < n_epochs and not self.finished():
                self.started = time.time()
                losses = self.train_epoch(len(self.history))
                self.score_epoch(losses)
                save_run(self)
                print_epoch(self)

    def train_epoch(self, epoch):
        """As many steps as there are training batches in all. Returns {drawn task: mean loss}."""
        rng = np.random.default_rng([self.settings.seed, epoch])
        rank, _ = processes()                             # every process has its own dropout
        torch.manual_seed(int(rng.integers(2 ** 63)) + rank)
        n_batches = [task.n_batches(self.settings.batch_size) for task in self.tasks]
        plan = plan_epoch(self.settings.schedule, n_batches, rng)
        losses = {}
        self.model.train()
        for step, (previous, index) in enumerate(zip([None, *plan], plan), 1):
            if self.settings.schedule == "successive" and index != previous:
                set_anchor(self)
            task = self.tasks[index]
            loss = self.train_step(task)
            losses.setdefault(task.name, []).append(loss)
            show_step(self, step, len(plan), loss)
        return {name: float(torch.stack(values).mean()) for name, values in losses.items()}

    def train_step(self, task):
        """One step on the task's next batch; the loss, as a tensor."""
        # The next batch, or this process's share of it.
        documents = task.batch(self.steps[task.name], self.settings.batch_size, self.settings.seed)
        self.steps[task.name] += 1
        documents, weight = weighted_share(documents)        # all, and 1, in a single process
        batch = make_batch(documents, self.vocabulary).to(self.model.device())

        # Its gradient, of norm `clip` at most.
        self.model.zero_grad()               # to None: Adam skips what the task does not use
        loss = self.model(task.name, batch)["loss"] * weight
        loss.backward()
        loss = add_up(loss, self.model)      # it, and the gradients, of all processes
        if self.anchor:
            hold_to_anchor(self)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        refuse_non_finite(self, task, loss, norm)

        # One step of the task's own optimizer.
        self.optimizers[task.name].step()
        return loss

    def score_epoch(self, losses):
        """Scores every task on dev; the plateau rule may then halve its learning rate."""
        rates = {name: o.param_groups[0]["lr"] for name, o in self.optimizers.items()}
        dev = {task.name: self.evaluate(task, "dev") for task in self.tasks}
        self.history.append({"epoch": len(self.history) + 1, "steps": dict(self.steps),
                             "loss": losses, "dev": dev, "lr": rates})
        for task in self.tasks:
            scores = self.dev_scores(task)
            if any(scores):                         # while it is still 0 it keeps its rate
                self.lr_schedulers[task.name].step(scores[-1])

    def evaluate(self, task, split):
        """The scores of one task on its dev or test documents."""
        return evaluate(self.model, self.vocabulary, task, task.data[split])

    def dev_scores(self, task):
        """The score that training watches, of every epoch; negated if it should decrease."""
        sign = -1 if task.validation_metric_decreases else 1
        return [sign * row["dev"][task.name][task.validation_metric_name] for row in self.history]

    def mean_scores(self):
        return [sum(row) / len(row) for row in zip(*map(self.dev_scores, self.tasks))]

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
        step, good = trainer.steps[task.name], len(trainer.history)
        raise Stopped(f"{trainer.folder}: the loss or gradient of {task.name} is not finite at its "
                      f"step {step}, in epoch {good + 1}; checkpoint.pt is good and holds epoch "
                      f"{good}")

def shared_parameters(model):
    """Those of embedder and encoders, and of heads that share their layers, each once."""
    asked = nn.ModuleList(h for h in model.heads.values() if isinstance(h, QuestionHead))
    return [p for part in (model.embedder, model.encoders, asked) for p in part.parameters()]

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
    """(rank, world size): the number of this process, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

def own_share(documents):
    """The documents of this process, from a list in the order of lengths. It is dealt back and
    forth, to two processes 0 1 1 0 0 1 1 0 ...: so their shares take about the same time."""
    rank, n = processes()
    turns = [*range(n), *reversed(range(n))]
    return [d for i, d in enumerate(documents) if turns[i % (2 * n)] == rank]

def weighted_share(documents):
    """This process's documents, and their share of the batch: a loss is a mean over documents, so
    the weighted losses add up to that of the batch. Without any, the first, with weight 0: all
    processes must have gradients of the same parameters."""
    own = own_share(documents)
    return own or documents[:1], len(own) / len(documents)

def add_up(loss, model):
    """The loss, and in place every p.grad, becomes its sum over the processes. With one vector, two
    processes with batches of 32 read 1.6 times the sentences a second of one with batches of 16,
    with torch's DistributedDataParallel 1.5 times."""
    values = [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    if dist.is_initialized():
        added = nn.utils.parameters_to_vector(values)
        dist.all_reduce(added)
        nn.utils.vector_to_parameters(added, values)
    return values[0]

def gathered(value):
    """The value of every process."""
    values = [value] * processes()[1]
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values

def add_up_processes(metric):
    shares = gathered((metric.sums, metric.confusions))
    metric.sums, metric.confusions = {}, sum((pairs for _, pairs in shares), Counter())
    for counts, _ in shares:
        metric.add(counts)

# The files of a run, in the order of writing: log, checkpoint, best weights. After a kill, --resume
# writes log and best weights again, from the checkpoint.
def checksums(tasks):
    """{task: {split: checksum of its documents}}."""
    return {task.name: {split: sha256(repr([(d.sentences, d.annotations) for d in x]).encode())
                        .hexdigest() for split, x in task.data.items()} for task in tasks}

def start_run(trainer):
    """Writes what the first epoch needs to be resumed."""
    if not trainer.history:
        log, vocabulary = trainer.folder / "log.jsonl", trainer.vocabulary
        new = not log.exists() or not log.stat().st_size
        expect(new, trainer.folder, "a folder without a run", "log.jsonl")
        if trainer.settings.vectors:
            words = "".join(word + "\n" for word in vocabulary.words[len(vocabulary.counts):])
            vectors = trainer.model.embedder.words.frozen
            write(trainer.folder / "vectors.pt", {"words": words, "vectors": vectors})
        save_run(trainer)

def trained(trainer):
    """What predicts. The words that only the vector file has are in vectors.pt."""
    vocabulary = trainer.vocabulary
    words = vocabulary.words[:len(vocabulary.counts)]
    return {"settings": asdict(trainer.settings), "model": trainer.model.state_dict(),
            "vocabulary": {"words": words, "chars": vocabulary.chars, "counts": vocabulary.counts,
                           "contextual": [*vocabulary.contextual.shape]},
            "labels": {task.name: task.labels() for task in trainer.tasks}}

def watched(trainer):
    """{name of a file of best weights: the scores of all epochs, which choose the best}."""
    scores = {f"best-{task.name}.pt": trainer.dev_scores(task) for task in trainer.tasks}
    return scores | {"best.pt": trainer.mean_scores()}

def save_run(trainer):
    log = "".join(json.dumps(row) + "\n" for row in trainer.history)
    write(trainer.folder / "log.jsonl", log)
    state = trained(trainer)
    write(trainer.folder / "checkpoint.pt", {
        **state, "data": trainer.checksums, "steps": trainer.steps, "history": trainer.history,
        **{f"optimizer {name}": o.state_dict() for name, o in trainer.optimizers.items()},
        **{f"lr_scheduler {name}": s.state_dict() for name, s in trainer.lr_schedulers.items()}})
    for name, values in watched(trainer).items():
        if values and best_epoch(values) == len(values) - 1:
            write(trainer.folder / name, state)

def restore_run(trainer, checkpoint):
    """Everything but the model, which `build` has loaded."""
    for task, splits in trainer.checksums.items():
        for split, checksum in splits.items():
            expect(checkpoint["data"][task][split] == checksum, "--resume",
                   f"the {split} data of {task} as in the run", "others")
    for name, optimizer in trainer.optimizers.items():
        optimizer.load_state_dict(checkpoint[f"optimizer {name}"])
        trainer.lr_schedulers[name].load_state_dict(checkpoint[f"lr_scheduler {name}"])
        for p, state in optimizer.state.items():               # a wrong shape corrupts memory
            shapes = [tuple(state[key].shape) for key in ("step", "exp_avg", "exp_avg_sq")]
            expect(state["step"].is_floating_point() and shapes == [(), p.shape, p.shape],
                   f"optimizer {name}", f"a state of {tuple(p.shape)}", str(shapes))
    trainer.steps = {task.name: int(checkpoint["steps"][task.name]) for task in trainer.tasks}
    trainer.history = checkpoint["history"]
    done = len(trainer.history)
    for name, values in watched(trainer).items():              # the checkpoint has the last epoch's
        there = not values or best_epoch(values) == done - 1 or (trainer.folder / name).exists()
        expect(there, trainer.folder, name, "none")
    expect(trainer.settings.epochs >= done, "--epochs", f"at least {done}, as many as the run has",
           str(trainer.settings.epochs))

def write_results(trainer):
    """Final scores, into results.json and returned: of each task's own best weights, as in the
    paper, and of the one model with the best mean, which stays loaded."""
    gathered(None)                    # waits until the first process has written the weights
    model, tasks = trainer.model, {}
    for task in trainer.tasks:
        scores, steps = trainer.dev_scores(task), trainer.steps[task.name]
        own_best = final_scores(trainer, task, f"best-{task.name}.pt")
        pairs = model.metrics[task.name].confusions      # of test, which was scored last
        tasks[task.name] = {
            "steps": steps, "passes": steps / task.n_batches(trainer.settings.batch_size),
            "best_epoch": best_epoch(scores) + 1, "best_dev": abs(max(scores)),
            "last_dev": abs(scores[-1]),                   # without the sign of `dev_scores`
            "own_best": own_best, "labels": label_scores(pairs),
            "confusions": [[*pair, n] for pair, n in label_errors(pairs)],
            "one_model": final_scores(trainer, task, "best.pt")}
    results = {"settings": asdict(trainer.settings), "tasks": tasks,
               "mixtures": {name: dict(zip(model.reads[name], weights.softmax(0).tolist()))
                            for name, weights in model.mixtures.items()},
               "one_model_epoch": best_epoch(trainer.mean_scores()) + 1}
    mixture = model.embedder.mixture
    if mixture:
        shares = {f"layer {i}": x for i, x in enumerate(mixture.weights.softmax(0).tolist())}
        results["mixtures"]["every encoder"] = shares | {"gamma": mixture.gamma.item()}
    write(trainer.folder / "results.json", json.dumps(results, indent=1) + "\n")
    return results

def final_scores(trainer, task, name):
    with one_line(f"{trainer.folder / name}: expected weights of this run"):
        state = load(trainer.folder / name, trainer.model.device())
        trainer.model.load_state_dict(state["model"])
    return {split: trainer.evaluate(task, split) for split in ("dev", "test")}

def write(path, content):
    """Text, or tensors and plain values. The name always holds a whole file, the old or the new."""
    if processes()[0] > 0:
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            if isinstance(content, str):
                file.write(content.encode())
            else:
                torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:         # a full disk; torch makes it a RuntimeError
        temporary.unlink(missing_ok=True)
        raise Stopped(f"{path}: {error!r:.200}; earlier files of the run are intact") from None

def load(path, device="cpu"):
    """Tensors and plain values, no code. zipfile compares the checksums, which torch does not."""
    with one_line(f"{path}: expected a checkpoint of train.py"), zipfile.ZipFile(path) as file:
        if any(member.compress_type for member in file.infolist()) or file.testzip():
            raise ValueError("compressed or damaged")          # torch never compresses
        return torch.load(path, map_location=device, weights_only=True)

def new_folder(tasks):
    """runs/<tasks>, with a numeric suffix if that folder already exists."""
    name = Path("runs", "-".join(tasks))
    names = chain([name], (Path(f"{name}-{n}") for n in count(2)))
    return next(name for name in names if not name.exists())

LOCKED = set()                                           # the folders that this process has locked

@contextmanager
def locked(folder):
    """Makes the folder and refuses all other processes in it. SQLite can lock on every system; an
    exit, even a kill, ends it. Of several processes that train together the first holds it."""
    if folder in LOCKED or int(os.environ.get("RANK", processes()[0])) > 0:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with one_line(f"{folder}: expected no other process that trains in it"):
        connection = sqlite3.connect(folder / "lock", timeout=0, isolation_level=None)
        connection.execute("BEGIN EXCLUSIVE")
    LOCKED.add(folder)
    try:
        yield
    finally:
        LOCKED.remove(folder)
        connection.close()

# The screen.
def visible(text):
    """Characters that steer a screen are shown, not sent."""
    return re.sub("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]",
                  lambda match: ascii(match[0])[1:-1], text)

def show_progress(text):
    """A status line, overwritten by the next one; shown only on a terminal."""
    if sys.stderr.isatty() and processes()[0] == 0:
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

def show_step(trainer, step, n_steps, loss):
    if sys.stderr.isatty():
        left = (time.time() - trainer.started) / step * (n_steps - step)
        show_progress(f"epoch {len(trainer.history) + 1}: step {step} of {n_steps}, "
                      f"loss {loss:.2f}, {left:.0f} s to go")

def print_epoch(trainer):
    show_progress("")
    n, seconds = len(trainer.history), time.time() - trainer.started
    line = f"epoch {n:3d}  {seconds:5.1f} s "
    for task in trainer.tasks:
        scores = trainer.dev_scores(task)
        star = " " if epochs_waited(scores) else "*"
        cell = f"{abs(scores[-1]):5.1f}{star}" if any(scores) else "none yet"
        line += f"  {task.name} {cell:8s}"
    if n == 1 < trainer.n_epochs:
        line += f"  at most {seconds * (trainer.n_epochs - 1):.0f} s to go"
    print(line.rstrip(), flush=True)

def print_start(trainer):
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
        lists = [rows for d in task.data["train"] for rows in d.annotations[task.annotation]]
        left, total, why = 0, sum(map(len, lists)), "overlap another"
        if task.whole_documents:
            print(f"{task.name}: {total} spans in {len(lists)} clusters")
            left = sum(end - start >= settings.max_span for start, end in chain(*lists))
            why = f"have more than --max-span {settings.max_span} words"
        else:
            labels = Counter(label for *_, label in chain(*lists)).most_common(20)
            print(f"{task.name}:", ", ".join(f"{visible(label)} {n}" for label, n in labels))
            unseen = {*task.labels("dev"), *task.labels("test")} - {*task.labels()}
            if unseen:
                print(f"{task.name}: not in train:", visible(", ".join(sorted(unseen))))
        if isinstance(model.heads[task.name], Tagger):
            left = total - sum(len(outermost(spans)) for spans in lists)
        if left:
            print(f"{task.name}: not learned: {left} of {total} training spans, which {why}")
    parts = model.embedder, model.encoders, model.heads, model
    sizes = [sum(p.numel() for p in part.parameters()) for part in parts]
    print("parameters: {:,} embedder, {:,} encoders, {:,} heads, {:,} in all".format(*sizes))
    print(f"run folder: {trainer.folder}\n\ndev scores, * where they are the best so far")

def score_names(scores):
    return [name for name in scores if not name.endswith(("recall", "precision"))]

def print_results(trainer, results):
    print("\nF1 on test in percent: of each task's own best weights, and of the one model with the "
          f"best mean on dev (epoch {results['one_model_epoch']})\n\n"
          "task   score        own best   one model   own best on dev")
    for name, row in results["tasks"].items():
        own, one, dev = row["own_best"]["test"], row["one_model"]["test"], row["own_best"]["dev"]
        for score in score_names(own):
            print(f"{name:6s} {score:11s} {own[score]:9.2f} {one[score]:11.2f} "
                  f"{dev.get(score, np.nan):17.2f}")
    print()
    n = len(trainer.history)
    for name, row in results["tasks"].items():
        more = f": --epochs {2 * n} may help" if row["best_epoch"] == n else ""
        more = more if row["best_dev"] else f", scored nothing: --epochs {2 * n} may help"
        print("{}: best at epoch {best_epoch} of {}{}; dev {best_dev:.2f} then, {last_dev:.2f} at "
              "the end; {steps} steps, {passes:.1f} passes over its data".format(
                  name, n, more, **row))
    for name, weights in results["mixtures"].items():
        print(f"{name} reads " + ", ".join(f"{w:.2f} {encoder}" for encoder, w in weights.items()))

def print_examples(trainer):
    """Two short dev documents of every task, as predicted; gold too if that is wrong."""
    trainer.model.eval()
    for task in trainer.tasks:
        print(f"\n{task.name}, dev")
        names, dev = [task.annotation], task.data["dev"]
        for gold in [d for d in dev if any(d.annotations[names[0]]) and len(d) < 100][:2]:
            found = next(annotate(trainer.model, [gold], trainer.vocabulary))
            if task.name == "rel" and not argument_tagger(trainer.model.tasks):
                rows = gold.annotations["relations"][0]      # without a tagger, only last tokens
                rows = [(i, i, j, j, label) for _, i, _, j, label in rows]
                gold = Document(gold.key, gold.sentences, {"relations": [rows]})
            found, gold = annotated_lines(found, names), annotated_lines(gold, names)
            versions = {"right": gold} if found == gold else {"wrong": found, "gold": gold}
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
    # Longest first. innermost: the shortest span so far around each token. A span crosses another
    # if it differs at both ends.
    opened, closed, innermost = Counter(), [""] * len(words), [None] * len(words)
    for start, end in sorted(labels, key=lambda span: (span[0] - span[1], span)):
        label = " ".join(dict.fromkeys(labels[start, end]))
        if innermost[start] == innermost[end]:
            innermost[start:end + 1] = [(start, end)] * (end + 1 - start)
            opened[start] += 1
            closed[end] = f" {label}]" + closed[end]
        else:
            notes[start].append(f"    {text(start, end)} {label}")
    lines, numbers = [], count()
    for sentence in document.sentences:
        tokens = [next(numbers) for _ in sentence]
        lines.append(" ".join("[" * opened[t] + words[t] + closed[t] for t in tokens))
        lines += chain.from_iterable(notes[t] for t in tokens)
    return [visible(line) for line in lines]

# A model from settings.
def build(settings, checkpoint=None, folder=None, features=""):
    """(tasks with data, vocabulary, model), from the settings or with the weights of a run."""
    check_settings(settings)
    tasks, device = choose_tasks(settings.tasks), device_of(settings.device)
    folders = data_folders(settings.data, tasks)
    for task in tasks:
        task.load_data(folders.get(task.name), settings.max_tokens)
    if checkpoint:
        model, vocabulary = load_run(folder, device, checkpoint, features)
        keep_features(vocabulary.contextual, tasks)
        return tasks, vocabulary, model
    contextual = ContextualVectors(features)
    keep_features(contextual, tasks)
    documents, words, vectors = [d for t in tasks for d in t.data["train"]], [], None
    if settings.vectors:
        vectors = words, values = read_vectors(settings.vectors)
        settings.word_dim = values.shape[1]              # the file's width wins
        seen = Counter(word.lower() for d in documents for word in chain(*d.sentences))
        known = seen.keys() & {*words}
        share = sum(seen[word] for word in known) / seen.total()
        print(f"vectors of {len(known)} of {len(seen)} training words, {share:.1%} of the tokens")
        expect(known, settings.vectors, "words of the training documents", "none")
    vocabulary = Vocabulary.from_documents(documents, words, contextual)
    labels = {task.name: task.labels() for task in tasks}
    torch.manual_seed(settings.seed)
    return tasks, vocabulary, HMTL(tasks, labels, vocabulary, settings, vectors).to(device)

def keep_features(contextual, tasks):
    """Computes the contextual vectors of all sentences of the run, once."""
    if contextual.path:
        started = time.time()
        documents = chain.from_iterable(chain(*task.data.values()) for task in tasks)
        sentences = {tuple(words) for d in documents for words in d.sentences}
        contextual.kept = contextual.compute(sentences, lambda done: show_progress(
            f"features: {done} of {len(sentences)} sentences, {time.time() - started:.0f} s"))
        show_progress("")
        megabytes = sum(x.nbytes for x in contextual.kept.values()) / 1e6
        print("features: {} sentences, {} layers of width {}, {:.0f} MB, {:.0f} s".format(
            len(sentences), *contextual.shape, megabytes, time.time() - started))

def load_run(folder, device="cpu", state=None, features=""):
    """(model, vocabulary) of a run, to predict with; or of the state of a checkpoint."""
    state, more, vectors = state or load(Path(folder, "best.pt")), [], None
    with one_line(f"{folder}: expected checkpoints of train.py"):
        settings = Settings(**state["settings"])
        expect(HIERARCHY.keys() >= {*settings.tasks}, folder, "the script that defines its tasks",
               " ".join(settings.tasks))
        check_settings(settings)
        if settings.vectors:                             # they are stored apart, once
            stored = load(Path(folder, "vectors.pt"))
            more = stored["words"].split("\n")[:-1]
            vectors = more, stored["vectors"]
        shape = tuple(state["vocabulary"]["contextual"])
        expect(any(shape) or not features, "--features", "none, as in the run", features)
        contextual = ContextualVectors(features, shape)
        vocabulary = Vocabulary(**state["vocabulary"] | {"contextual": contextual}, more_words=more)
        model = HMTL(choose_tasks(settings.tasks), state["labels"], vocabulary, settings, vectors)
        model.load_state_dict(state["model"])
    return model.to(device).eval(), vocabulary

def data_folders(data, tasks):
    """{task name: folder} from --data DIR, or --data TASK=DIR ...; {} without data."""
    names, folders = [task.name for task in tasks], {}
    for item in data:
        name, _, folder = item.partition("=") if "=" in item else ("", "", item)
        expect(name in ["", *names], "--data", f"one of the tasks {', '.join(names)}", name)
        expect(name not in folders, "--data", f"one folder for {name or 'all tasks'}", folder)
        folders[name] = folder
    for_all = folders.pop("", None)
    for name in names if data else []:
        expect(folders.setdefault(name, for_all), "--data", f"a folder for the task {name}", "none")
    return folders

def device_of(name):
    """The device of that name, or a GPU where there is one; under torchrun a GPU per process."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name
    with one_line(f"--device {name}"):
        torch.zeros(1, device=name).tolist()             # an error if there is no such device
    return torch.device(name)

def predict(model, vocabulary, paths, form):
    """Prints the documents at the paths with all that the model finds."""
    keys = [task.annotation for task in model.tasks.values()]
    tagged = [key for key, head in zip(keys, model.heads.values())
              if isinstance(head, (Tagger, SpanQuestions))]
    expect(form != "columns" or len(tagged) == 1, "--columns", "a run with one tagger",
           ", ".join(tagged) or "none")
    whole = form == "json" or any(task.whole_documents for task in model.tasks.values())
    for path in paths:
        documents = to_predict(path, tagged[0] if tagged else "ner", whole)
        gold = bool(tagged) and all(tagged[0] in d.annotations for d in documents)
        for document, found in zip(documents, annotate(model, documents, vocabulary)):
            if form == "json":
                lines = [to_json(found)]
            elif form == "columns":
                lines = column_lines([document, found] if gold else [found], tagged[0])
            else:
                lines = annotated_lines(found, keys)
            print("\n".join(lines), flush=True)

def to_predict(path, key, whole):
    """The documents of a file by its ending, or of raw text: of its sentences, if not whole."""
    raw = suffix_of(path) not in (*JSON_SUFFIXES, ".conll", ".bio")
    documents = [read_text(path)] if raw else read_annotated(path, key)
    expect(documents, path, "documents", "none")
    for i, document in enumerate(documents):
        expect(len(document), f"{path}, {document.key}", "some words", "none")
        documents[i] = cut_sentences(document, f"{path}, {document.key}")
    return cut_documents(documents, 1) if raw and not whole else documents

def column_lines(versions, key):
    """A word, its gold tag if there are two versions, and the predicted one: for conlleval."""
    lines = []
    for parts in zip(*(cut_documents([version], 1) for version in versions)):
        tags = [tags_of(part.annotations[key][0], len(part)) for part in parts]
        tags = [[{"U": "B", "L": "I"}.get(tag[0], tag[0]) + tag[1:] for tag in row] for row in tags]
        rows = zip(parts[0].sentences[0], *tags)
        lines += [visible(" ".join("_".join(x.split()) for x in row)) for row in rows] + [""]
    return lines

def print_evaluation(model, vocabulary, path):
    """The scores on a file, or on the test file of a folder."""
    path = file_of(path, "test") if Path(path).is_dir() else Path(path)
    annotated = [(task, task.parts(read_documents(path, task))) for task in model.tasks.values()]
    expect(any(rows for _, rows in annotated), path, "the key of a task of the run", "none")
    for task, documents in annotated:
        if documents:
            unit = "documents" if task.whole_documents else "sentences"
            print(f"\n{task.name}: {path}, {len(documents)} {unit}")
            scores = evaluate(model, vocabulary, task, documents)
            print_labels(scores, model.metrics[task.name].confusions)
        else:
            print(f"\n{task.name}: no document of {path} has the key '{task.annotation}'")

def print_labels(scores, pairs):
    """Scores, then precision, recall and F1 of the labels, then the most frequent confusions."""
    for name in score_names(scores):
        print(f"  {name:24s} {scores[name]:7.2f}")
    rows, errors = label_scores(pairs), label_errors(pairs)
    if rows:
        print("\n  label                    precision   recall       F1  predicted     gold")
    for label, row in list(rows.items())[:20]:
        print("  {:24.24s} {f1-precision:9.2f} {f1-recall:8.2f} {f1:8.2f} {predicted:10d} "
              "{gold:8d}".format(visible(label), **row))
    if errors:
        print("\n  most frequent errors: gold, found, times")
    for (right, found), n in errors[:8]:
        print(f"  {visible(right or '-'):24.24s} {visible(found or '-'):24.24s} {n:5d}")

# The command line.
FLAGS = {f.name: "--" + f.name.replace("_", "-") for f in fields(Settings)}
CHOICES = {"tasks": HIERARCHY, "schedule": ["proportional", "uniform", "successive"],
           "sharing": ["hierarchical", "flat", "inverted", "latent", "question"]}
LIMITS = {"dropout": (0, 0.99), "unknown": (0, 1), "seed": (0, 2 ** 63 - 1), "rare": (0, 1e9),
          "lr_patience": (0, 1e9), "successive_delta": (0, 1e9), "threads": (1, 1024),
          "contextual_dim": (0, 1e5), "max_span": (1, 1000)}           # all others: above 0

def check_settings(settings):
    """Refuses values that no model can be built from."""
    for f in fields(settings):
        flag, value = FLAGS[f.name], getattr(settings, f.name)
        kinds = (int, float) if f.type is float else f.type
        expect(isinstance(value, kinds), flag, f"a value of type {f.type.__name__}", shown(value))
        if f.name in CHOICES:
            chosen, choices = {*value} if f.type is tuple else {value}, CHOICES[f.name]
            expect(set() < chosen <= {*choices}, flag, f"one of {', '.join(choices)}", shown(value))
        elif f.name.endswith("encoder"):
            good = value == f.default or re.fullmatch(r"[1-9]\d?x[1-9]\d{,4}", value)
            expect(good, flag, "LAYERSxUNITS, as in 2x64", shown(value))
        elif f.type in (int, float):
            low, high = LIMITS.get(f.name, (1 if f.type is int else 1e-9, 1e9))
            expect(low <= value <= high, flag, f"a number from {low:g} to {high:g}", shown(value))

def shown(value):
    return (" ".join(value) if isinstance(value, tuple) else str(value)) or "none"

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(message)

def parse(arguments):
    """({setting: value} of those that are given, [--run, --resume, ... ])."""
    parser = Parser(description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--run", metavar="DIR", help="folder of the run")
    add("--resume", action="store_true",
        help="go on with --run; --epochs, --patience, --device, the place of --data may change")
    add("--predict", metavar="FILE", nargs="+",
        help="annotate raw text (-: standard input), .json, .jsonl, .conll or .bio")
    add_form = parser.add_mutually_exclusive_group().add_argument
    add_form("--json", dest="form", action="store_const", const="json", default="text",
        help="predict JSON lines")
    add_form("--columns", dest="form", action="store_const", const="columns",
        help="predict columns: word, tag of the file if it has one, predicted tag")
    add("--features", metavar="FILE.py", default="",
        help="your contextual vectors: a function features(sentences) (see the README)")
    add("--evaluate", metavar="PATH", help="score on an annotated file, or a folder's test file")
    helps = dict(re.findall(r"^    (\w+): .*# (.+)", inspect.getsource(Settings), re.M))
    for f in fields(Settings):
        kind = {"nargs": "+"} if f.type is tuple else {"type": f.type}
        add(FLAGS[f.name], default=argparse.SUPPRESS, choices=CHOICES.get(f.name), **kind,
            help=f"{helps[f.name]} (default: {shown(f.default)})")
    given = vars(parser.parse_args(arguments))
    other = [given.pop(k) for k in ("run", "resume", "predict", "evaluate", "features", "form")]
    if "tasks" in given:                                       # in the order of the hierarchy
        given["tasks"] = [task.name for task in choose_tasks(given["tasks"])]
    return {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}, other

def main(arguments=None):
    given, (folder, resume, paths, annotated, features, form) = parse(arguments)
    check_settings(Settings(**given))
    expect(folder != "", "--run", "a folder", "none")
    expect(folder or not (resume or paths or annotated), "--resume, --predict and --evaluate",
           "--run DIR", "none")
    expect(paths or form == "text", "--json and --columns", "--predict", "none")
    expect(not (resume and (paths or annotated)), "--resume", "no --predict or --evaluate", "both")
    folder = Path(folder or new_folder(given.get("tasks", Settings.tasks)))
    if paths or annotated:
        expect(given.keys() <= {"device", "threads"}, "--predict and --evaluate",
               "--device, --threads or no setting", " ".join(given))
        expect("RANK" not in os.environ, "--predict and --evaluate", "one process", "torchrun")
        torch.set_num_threads(given.get("threads", Settings.threads))
        model, vocabulary = load_run(folder, device_of(given.get("device")), features=features)
        if paths:
            predict(model, vocabulary, paths, form)
        if annotated:
            print_evaluation(model, vocabulary, annotated)
    elif resume:
        expect((folder / "checkpoint.pt").exists(), folder, "a run", "no checkpoint.pt")
        with locked(folder):                                   # before its state is read
            checkpoint = load(folder / "checkpoint.pt")
            run(resumed_settings(given, checkpoint, folder), folder, checkpoint, features)
    else:
        expect(not (folder / "checkpoint.pt").exists(), folder, "no run, or --resume", "a run")
        run(Settings(**given), folder, features=features)

def resumed_settings(given, checkpoint, folder):
    """The run's own, but for those that may change."""
    with one_line(f"{folder}: expected a checkpoint of train.py"):
        stored = asdict(Settings(**checkpoint["settings"]))
    for name, value in given.items():
        expect(value == stored[name] or name in ("epochs", "patience", "device", "data"),
               FLAGS[name], f"{shown(stored[name])}, as in the run", shown(value))
    return Settings(**stored | given)

def run(settings, folder, checkpoint=None, features=""):
    """Trains, or trains on, and prints the results."""
    torch.set_num_threads(settings.threads)
    if "LOCAL_RANK" in os.environ:                             # started by torchrun
        device = device_of(settings.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        folder = gathered(folder)[0]
    if processes()[0] > 0:
        sys.stdout = open(os.devnull, "w")
    tasks, vocabulary, model = build(settings, checkpoint, folder, features)
    trainer = MultiTaskTrainer(model, tasks, vocabulary, settings, folder)
    if checkpoint:
        with one_line(f"{folder}: expected a checkpoint of train.py"):
            restore_run(trainer, checkpoint)
        save_run(trainer)            # after a kill, log and best weights may differ from it
    print_start(trainer)
    try:
        with locked(folder):
            trainer.train(settings.epochs)
            print_results(trainer, write_results(trainer))
            print_examples(trainer)
    except KeyboardInterrupt:
        again = [] if "--resume" in sys.argv else ["--run", str(folder), "--resume"]
        raise Stopped(f"stopped; go on with: python {shlex.join([*sys.argv, *again])}") from None
    except RuntimeError as error:
        if not dist.is_initialized():
            raise
        raise Stopped(f"another process ended ({str(error)[:100]}); go on with --resume") from None
    if dist.is_initialized():
        dist.barrier()               # a process that leaves before the others may abort, in gloo
        dist.destroy_process_group()

def command_line():
    """`main`, with one line for what a user can mend."""
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")     # as all files are
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:                                    # such as `| head`: no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (InputError, Stopped, KeyboardInterrupt, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("(allocate|of) memory", str(error)):
            raise                                              # a fault of the code
        show_progress("")
        if os.environ.get("RANK", "0") == "0":                 # under torchrun, one line of all
            name = Path(sys.argv[0]).name
            print(f"{name}: {visible(str(error)) or 'stopped'}", file=sys.stderr, flush=True)
        if dist.is_initialized():                              # at a normal exit gloo may abort
            os._exit(2)
        sys.exit(2)

if __name__ == "__main__":
    command_line()
