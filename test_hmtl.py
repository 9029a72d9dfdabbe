"""The tests: every claim of the code against a second form that is easy to trust.

    python -m unittest test_hmtl                 # all; or test_hmtl.CRFTest for one class
    python test_hmtl.py benchmark                # what a training step costs
"""

import contextlib
import copy
import gc
import gzip
import io
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import unittest
import zipfile
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import train
from hmtl import (CRF, HIERARCHY, HMTL, CorefHead, Encoder, LayerMixture, RelationHead, Settings,
                  Tagger, annotate, clusters_of, dropout, gold_clusters, layout, predict_sentences,
                  run_in_groups, with_spans, with_types)
from tasks import (COREF_SCORES, Document, InputError, Scores, Vocabulary, b_cubed,
                   best_matching_sum, builtin_documents, ceaf_e, choose_tasks, confusions,
                   count_rows, cut_documents, cut_sentences, label_scores, make_batch, muc,
                   outermost, plan_batches, read_columns, read_json, read_text, read_vectors,
                   spans_of, tags_of, to_json)

HERE = Path(__file__).parent
ALL = ("ner", "emd", "rel", "coref")
TINY = Settings(word_dim=8, char_dim=4, char_filters=6, ner_encoder="2x6", emd_encoder="1x5",
                rel_encoder="2x6", coref_encoder="1x7", dropout=0.0, unknown=0.0, relation_units=9,
                coref_units=10, batch_size=4, epochs=3)


def setUpModule():
    torch.set_num_threads(1)             # in tiny models threads only wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"


def tiny_tasks(names=ALL, n=12):
    """Built-in tasks cut to n training, dev and test documents, most of them with something in."""
    tasks = choose_tasks(names)
    for seed, task in enumerate(tasks):
        longest = sys.maxsize if task.whole_documents else 1
        for i, split in enumerate(("train", "dev", "test")):
            documents = builtin_documents(n, np.random.default_rng([seed, i]))
            task.data[split] = cut_documents(documents, longest)[:n]
    return tasks


def tiny_model(names=ALL, settings=TINY, n=12):
    tasks = tiny_tasks(names, n)
    torch.manual_seed(0)
    vocabulary = Vocabulary.from_documents([d for task in tasks for d in task.data["train"]])
    labels = {task.name: task.labels() for task in tasks}
    return tasks, vocabulary, HMTL(tasks, labels, vocabulary, settings)


def tiny_trainer(names=ALL, folder="unused", **changes):
    settings = replace(TINY, **changes)
    tasks, vocabulary, model = tiny_model(names, settings)
    return train.MultiTaskTrainer(model, tasks, vocabulary, settings, folder)


def quietly(call, *arguments):
    with contextlib.redirect_stdout(io.StringIO()):
        return call(*arguments)


def overpadded(batch, tokens=5):
    """The same batch with more padding behind every sentence."""
    return replace(batch, tokens=nn.functional.pad(batch.tokens, (0, tokens)),
                   mask=nn.functional.pad(batch.mask, (0, tokens)))


def loss_and_gradient(model, name, batch):
    model.zero_grad()
    loss = model.train()(name, batch)["loss"]
    loss.backward()
    gradient = [torch.zeros_like(p) if p.grad is None else p.grad.clone()
                for p in model.parameters()]
    return loss.item(), gradient


# ---------------------------------------------------------------------------------- the encoder

class EncoderTest(unittest.TestCase):

    def test_equals_packed_bidirectional_lstm(self):
        torch.manual_seed(0)
        encoder, lengths = Encoder(5, "2x4", rate=0.0), [7, 1, 4]
        plain = nn.LSTM(5, 4, 2, batch_first=True, bidirectional=True)
        for lstms, end in [(encoder.forwards, ""), (encoder.backwards, "_reverse")]:
            for (layer, lstm), name in itertools.product(
                    enumerate(lstms), ("weight_ih", "weight_hh", "bias_ih", "bias_hh")):
                theirs = getattr(plain, f"{name}_l{layer}{end}").data
                ours = getattr(lstm, f"{name}_l0").data
                (theirs if "weight" in name else ours).copy_(ours if "weight" in name else theirs)
        x = torch.randn(3, 7, 5)
        mask = torch.arange(7) < torch.tensor(lengths)[:, None]
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True,
                                                   enforce_sorted=False)
        expected, _ = nn.utils.rnn.pad_packed_sequence(plain(packed)[0], batch_first=True)
        found = encoder(x * mask[:, :, None], mask)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
        self.assertEqual(found[~mask].abs().sum().item(), 0.0)

    def test_a_long_sentence_does_no_harm_to_the_gradient_of_a_short_one(self):
        """Weights that let gradients grow: nothing may run through 295 tokens of padding."""
        torch.manual_seed(0)
        encoder = Encoder(5, "1x8", rate=0.0)
        mask = torch.arange(300) < torch.tensor([[5], [300]])
        for lstm in [*encoder.forwards, *encoder.backwards]:
            for of_state in lstm.weight_hh_l0.data.chunk(4):
                nn.init.orthogonal_(of_state, 4.0)
        x, weights = torch.randn(2, 300, 5) * mask[:, :, None], torch.randn(2, 300, 16)

        def gradient(rows, n, dtype):
            encoder.to(dtype).zero_grad()
            output = encoder(x[rows, :n].to(dtype), mask[rows, :n])
            (output * weights[rows, :n].to(dtype)).sum().backward()
            return torch.cat([p.grad.flatten() for p in encoder.parameters()])
        self.assertTrue(gradient(slice(2), 300, torch.float32).isfinite().all())
        alone = [gradient([i], n, torch.float64) for i, n in enumerate((5, 300))]
        torch.testing.assert_close(gradient(slice(2), 300, torch.float64), sum(alone))

    def test_groups_of_like_length_equal_one_batch(self):
        torch.manual_seed(0)
        encoder, calls = Encoder(5, "2x4", rate=0.0), []
        encoder.register_forward_hook(lambda _, inputs, output: calls.append(inputs[1]))
        for lengths, shapes in [((3, 9, 1, 4, 8, 2, 9, 1, 1, 30), [(8, 9), (2, 30)]),
                                ((3, 9, 1, 4, 8), [(3, 4), (2, 9)]),
                                ((4, 3, 3, 4, 2), [(5, 4)])]:        # 1.25 times its tokens
            documents = [Document("d", [["a"] * n for n in lengths])]
            batch = make_batch(documents, Vocabulary.from_documents(documents))
            x = torch.randn(*batch.mask.shape, 5) * batch.mask[:, :, None]
            whole = encoder(x, batch.mask)
            calls.clear()
            size = 8 if len(lengths) > 5 else 3
            torch.testing.assert_close(run_in_groups(encoder, x, batch, size), whole)
            self.assertEqual([tuple(mask.shape) for mask in calls], shapes)


    def test_only_the_forget_gate_starts_open(self):
        encoder = Encoder(5, "2x4", rate=0.0)
        lstms = [*encoder.forwards, *encoder.backwards]
        self.assertEqual([lstm.bias_ih_l0.tolist() for lstm in lstms],     # gates: input, forget,
                         [[0.0] * 4 + [1.0] * 4 + [0.0] * 8] * 4)          # cell, output
        self.assertEqual([lstm.bias_hh_l0.tolist() for lstm in lstms], [[0.0] * 16] * 4)


class DropoutTest(unittest.TestCase):

    def test_share_and_scale(self):
        x = torch.ones(50, 30, 64)
        for width, p in [(13, 0.5), (64, 0.75), (8, 0.0)]:
            torch.manual_seed(0)
            factors = dropout(x[:, :, :width], p, training=True)
            self.assertEqual(factors.shape, (50, 30, width))
            values = [0.0, 1 / (1 - p)] if p else [1.0]
            self.assertEqual(factors.unique().tolist(), values)
            share = (factors == 0).double().mean((0, 1))         # of 1,500 draws a column
            torch.testing.assert_close(share, torch.full_like(share, p), atol=0.06, rtol=0)
        self.assertTrue(torch.equal(dropout(x, 0.5, training=False), x))

    def test_where_it_is(self):
        """Padding stays zero; every layer of an encoder has it, and so has the embedder."""
        torch.manual_seed(0)
        mask = torch.arange(40) < torch.tensor([[40], [25]])
        encoder, seen = Encoder(5, "2x50", rate=0.5), []
        encoder.forwards[1].register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
        seen.append(encoder(torch.randn(2, 40, 5) * mask[:, :, None], mask))
        _, vocabulary, model = tiny_model(("ner",), replace(TINY, dropout=0.5))
        words = vocabulary.words[2:82]
        batch = make_batch([Document("d", [words[:40], words[40:65]])], vocabulary)
        seen.append(model.embedder(batch)[:, :, :TINY.word_dim])
        for x in seen:
            self.assertAlmostEqual((x[mask][:, :100] == 0).double().mean().item(), 0.5, delta=0.06)
            self.assertEqual(x[~mask][:, :100].abs().sum().item(), 0.0)
        self.assertFalse((encoder.eval()(torch.randn(2, 40, 5), mask)[mask] == 0).any())


# -------------------------------------------------------------------------------------- the CRF

class CRFTest(unittest.TestCase):
    LENGTHS = [4, 1, 3, 2]

    def setUp(self):
        torch.manual_seed(1)
        self.tagger = self.tagger_of(["X"])               # O B-X I-X U-X L-X
        self.k = len(self.tagger.tags)
        self.crf = self.tagger.crf
        for p in self.crf.parameters():
            nn.init.normal_(p)
        self.mask = torch.arange(4) < torch.tensor(self.LENGTHS)[:, None]
        self.emissions = torch.randn(4, 4, self.k)

    def tagger_of(self, labels):
        return Tagger(choose_tasks(["ner"])[0], labels, 3, 0, TINY)

    def path_score(self, b, path):
        crf, e = self.crf, self.emissions[b]
        score = crf.start[path[0]] + crf.end[path[-1]] + sum(e[t, k] for t, k in enumerate(path))
        return (score + sum(crf.transitions[i, j] for i, j in zip(path, path[1:]))).item()

    def paths(self, b):
        return itertools.product(range(self.k), repeat=self.LENGTHS[b])

    def test_likelihood_against_enumeration(self):
        tags = torch.randint(self.k, (4, 4))
        losses = self.crf.loss(self.emissions, tags, self.mask)
        for b, n in enumerate(self.LENGTHS):
            scores = torch.tensor([self.path_score(b, p) for p in self.paths(b)])
            total = scores.double().logsumexp(0)
            expected = total.item() - self.path_score(b, tags[b, :n].tolist())
            self.assertAlmostEqual(losses[b].item(), expected, places=4)

    def test_gradient_is_the_marginal_probability(self):
        emissions = self.emissions.clone().requires_grad_()
        self.crf.log_partition(emissions, self.mask).sum().backward()
        for b, n in enumerate(self.LENGTHS):
            paths = list(self.paths(b))
            weights = torch.tensor([self.path_score(b, p) for p in paths]).double().softmax(0)
            expected = torch.zeros(4, self.k, dtype=torch.float64)
            for path, weight in zip(paths, weights):
                expected[range(n), path] += weight
            torch.testing.assert_close(emissions.grad[b].double(), expected, atol=1e-5, rtol=1e-4)

    def test_equal_scores_count_the_paths(self):
        for p in self.crf.parameters():
            nn.init.zeros_(p)
        logs = self.crf.log_partition(torch.zeros(4, 4, self.k), self.mask)
        for log, n in zip(logs.tolist(), self.LENGTHS):
            self.assertAlmostEqual(log, n * np.log(self.k), places=4)

    def test_extreme_scores_against_logs_in_float64(self):
        torch.manual_seed(2)
        for scale in (1.0, 30.0, 1000.0):
            emissions = torch.randn(3, 50, self.k) * scale
            for p in self.crf.parameters():
                nn.init.normal_(p, std=5.0)
            mask = torch.ones(3, 50, dtype=torch.bool)
            emissions.requires_grad_()
            found = self.crf.log_partition(emissions, mask)
            state = self.crf.start.double() + emissions[:, 0].double()
            for t in range(1, 50):
                state = (state[:, :, None] + self.crf.transitions.double()).logsumexp(1) \
                    + emissions[:, t].double()
            expected = (state + self.crf.end.double()).logsumexp(1)
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-3)
            found.sum().backward()
            self.assertTrue(emissions.grad.isfinite().all())

    def test_viterbi_against_enumeration_of_well_formed_paths(self):
        found = self.crf.decode(self.emissions, self.mask)
        for b, n in enumerate(self.LENGTHS):
            allowed = [p for p in self.paths(b)
                       if self.well_formed([self.tagger.tags[k] for k in p])]
            best = max(allowed, key=lambda p: self.path_score(b, p))
            self.assertEqual(found[b, :n].tolist(), list(best))

    def well_formed(self, tags):
        return re.fullmatch(r"(O|U|BI*L)*", "".join(tag[0] for tag in tags)) is not None

    def test_decoded_tags_are_well_formed(self):
        tagger = self.tagger_of(["X", "Y"])
        for scale in (0.0, 1.0, 1e4):
            mask = torch.arange(9) < torch.arange(1, 10)[:, None]
            tags = tagger.crf.decode(torch.randn(9, 9, 9) * scale, mask)
            for n, row in enumerate(tags.tolist(), 1):
                row = [tagger.tags[k] for k in row[:n]]
                self.assertTrue(self.well_formed(row), row)
                self.assertTrue(all(a[2:] == b[2:] for a, b in zip(row, row[1:]) if a[0] in "BI"))

    def test_spans_to_tags_and_back(self):
        spans = [(0, 0, "X"), (2, 4, "Y"), (5, 6, "X")]
        tags = tags_of(spans, 8)
        self.assertEqual(tags, ["U-X", "O", "B-Y", "I-Y", "L-Y", "B-X", "L-X", "O"])
        self.assertEqual(spans_of(tags), spans)
        nested = [(0, 1, "X"), (0, 4, "Y"), (3, 6, "X"), (6, 6, "Y")]
        self.assertEqual(sorted(outermost(nested)), [(0, 4, "Y"), (6, 6, "Y")])
        self.assertEqual(outermost([(1, 2, "X"), (2, 4, "X"), (4, 5, "X")]), [(2, 4, "X")])


# ------------------------------------------------------------------------ relations, coreference

class RelationTest(unittest.TestCase):

    def test_one_score_by_hand(self):
        torch.manual_seed(0)
        head = RelationHead(choose_tasks(["rel"])[0], ["A", "B"], 4, 0, TINY)
        x, mask = torch.randn(2, 5, 4), torch.arange(5) < torch.tensor([[3], [5]])
        batch = replace(make_batch([Document("d", [["a"]])], Vocabulary([], [], [])),
                        mask=mask, lengths=[3, 5])
        scores = head.logits(x, batch)
        self.assertEqual([tuple(s.shape) for s in scores], [(3, 3, 2), (5, 5, 2)])
        hidden = [max(0.0, (head.first.weight[h] @ x[1, 4] + head.first.bias[h]
                            + head.second.weight[h] @ x[1, 2]).item()) for h in range(9)]
        by_hand = sum(head.label.weight[1, h].item() * hidden[h] for h in range(9)) \
            + head.label.bias[1].item()
        self.assertAlmostEqual(scores[1][4, 2, 1].item(), by_hand, places=5)

    def test_loss_is_binary_cross_entropy_over_real_pairs(self):
        tasks, vocabulary, model = tiny_model(("rel",))
        documents = tasks[0].data["train"][:3]
        batch = make_batch(documents, vocabulary)
        words, outputs = model.encode(batch, ["rel"])
        head, expected = model.heads["rel"], 0.0
        for document, scores in zip(documents, head.logits(outputs["rel"], batch)):
            truth = torch.zeros_like(scores)
            for _, i, _, j, label in document.annotations["relations"][0]:
                truth[i, j, head.labels.index(label)] = 1
            expected += nn.functional.binary_cross_entropy_with_logits(scores, truth,
                                                                       reduction="sum")
        found = head.loss(outputs["rel"], words, batch)
        self.assertAlmostEqual(found.item(), expected.item() / 3, places=3)

    def test_a_pair_is_related_above_one_half(self):
        head = RelationHead(choose_tasks(["rel"])[0], ["A", "B", "C"], 4, 0, TINY)
        x = torch.randn(1, 2, 4)
        batch = make_batch([Document("d", [["a", "b"]])], Vocabulary([], [], []))
        self.assertEqual(head.decode(x, None, batch), [[]])        # hardly any pair is, at first
        nn.init.zeros_(head.label.weight)
        head.label.bias.data = torch.tensor([-0.1, 0.1, 0.0])
        pairs = [(i, j, "B") for i in range(2) for j in range(2)]
        self.assertEqual(head.decode(x, None, batch), [pairs])

    def test_arguments_are_the_spans_that_end_there(self):
        spans = [(0, 1, "P"), (3, 3, "O")]
        relations = with_spans([(1, 3, "A"), (3, 2, "A"), (0, 1, "A")], spans)
        self.assertEqual(relations, [(0, 1, 3, 3, "A")])
        self.assertEqual(with_types(relations, spans), [(0, 1, 3, 3, "A", "P", "O")])


class CorefTest(unittest.TestCase):

    def parts(self, sentences, clusters, **changes):
        torch.manual_seed(3)
        document = Document("d", sentences, {"clusters": clusters})
        settings = replace(TINY, **changes)
        vocabulary = Vocabulary.from_documents([document])
        task = choose_tasks(["coref"])
        model = HMTL(task, {"coref": []}, vocabulary, settings)
        batch = make_batch([document], vocabulary)
        words, outputs = model.encode(batch, ["coref"])
        return model.heads["coref"], (outputs["coref"], words, batch)

    def enumerated_loss(self, head, inputs, clusters):
        """-log of the summed probability of all ways to choose correct antecedents."""
        gold = gold_clusters(inputs[2], clusters, head.settings.max_span)
        first, last, scores, g = head.keep_spans(*inputs, gold)
        spans = list(zip(first.tolist(), last.tolist()))
        owner = {m: i for i, c in enumerate(clusters) for m in c}

        def pair_score(i, j):
            bucket = [0, 0, 1, 2, 3, 4, 4, 4, 5][min(i - j, 8)]
            product = head.narrow(g[i]) * head.narrow(g[j])
            read = g[i], g[j], product, head.distance.weight[bucket]
            hidden = sum(part(x) for part, x in zip(head.pair.parts, read))
            return (head.pair(hidden) + scores[i] + scores[j]).item()
        rows = []                                           # per span: {antecedent: score}
        for i in range(len(spans)):
            nearest = range(max(0, i - head.settings.antecedents), i)
            rows.append({None: 0.0} | {j: pair_score(i, j) for j in nearest})
        right = total = 0.0
        for choice in itertools.product(*rows):
            weight = float(np.exp(sum(row[j] for row, j in zip(rows, choice))))
            total += weight
            ok = True
            for i, j in enumerate(choice):
                gold = [a for a in rows[i] if a is not None and spans[i] in owner
                        and owner.get(spans[a]) == owner[spans[i]]]
                ok &= j in gold if gold else j is None
            right += weight * ok
        return -np.log(right / total), spans

    def check(self, sentences, clusters, **changes):
        head, inputs = self.parts(sentences, clusters, **changes)
        expected, spans = self.enumerated_loss(head, inputs, clusters)
        loss = head.loss(*inputs)
        self.assertAlmostEqual(loss.item(), expected, places=4)
        loss.backward()
        return spans, loss.item()

    SENTENCES = [["a", "b", "c"], ["d", "e"], ["a", "f"]]

    def test_loss_against_enumeration(self):
        clusters = [[(0, 0), (3, 3), (5, 5)], [(1, 1), (4, 4)]]
        self.check(self.SENTENCES, clusters, max_span=1, spans_per_token=1.0)
        self.check(self.SENTENCES, clusters, max_span=1, spans_per_token=1.0, antecedents=2)
        spans, _ = self.check(self.SENTENCES, [[(0, 0), (3, 4)], [(1, 2), (4, 4)]], max_span=2)
        self.assertIn(len(spans), range(4, 7))

    def test_no_cluster_one_token_and_every_gold_span_pruned(self):
        self.check(self.SENTENCES, [])
        spans, loss = self.check([["a"]], [])
        self.assertEqual((spans, loss), ([(0, 0)], 0.0))
        self.check(self.SENTENCES, [[(0, 2), (3, 4)]], max_span=1)    # all too long to be kept

    def test_training_keeps_gold_mentions_beside_the_best(self):
        clusters = [[(0, 2), (3, 4)], [(1, 1), (6, 6)], [(2, 3), (5, 5)]]        # (2, 3) is no span
        head, inputs = self.parts(self.SENTENCES, clusters, spans_per_token=0.5)
        def kept(gold=None):
            first, last, _, _ = head.keep_spans(*inputs, gold)
            return list(zip(first.tolist(), last.tolist()))
        best, mentions = kept(), {(0, 2), (3, 4), (1, 1), (6, 6), (5, 5)}
        head.settings.spans_per_token = 9.0                                      # all of them
        scores = dict(zip(kept(), head.keep_spans(*inputs)[2].tolist()))
        head.settings.spans_per_token = 0.5
        self.assertEqual(best, sorted(sorted(scores, key=scores.get)[-3:]))
        self.assertFalse(mentions <= {*best})
        gold = gold_clusters(inputs[2], clusters, TINY.max_span)
        self.assertEqual(kept(gold), sorted({*best} | mentions))

    def test_spans_lie_within_a_sentence_in_order(self):
        head, inputs = self.parts(self.SENTENCES, [], max_span=3, spans_per_token=2.0)
        first, last, scores, g = head.keep_spans(*inputs)
        spans = list(zip(first.tolist(), last.tolist()))
        everything = [(s, e) for a, b in [(0, 3), (3, 5), (5, 7)] for s in range(a, b)
                      for e in range(s, min(b, s + 3))]
        self.assertEqual(spans, everything)                       # all there are, though 14 wanted
        words = inputs[1][inputs[2].mask]
        x = inputs[0][inputs[2].mask]
        start, end = spans[2]                                     # one representation by hand
        weights = head.attention(x[start:end + 1])[:, 0].softmax(0)
        by_hand = [x[start], x[end], weights @ words[start:end + 1],
                   head.span_width.weight[end - start]]
        torch.testing.assert_close(g[2], torch.cat(by_hand))
        hidden = sum(part(x) for part, x in zip(head.mention.parts, by_hand))
        torch.testing.assert_close(scores[2], head.mention(hidden))

    def test_gold_clusters_by_start_and_width(self):
        clusters = [[(0, 2), (3, 4)], [(2, 2), (5, 6)]]
        _, (_, _, batch) = self.parts(self.SENTENCES, clusters)
        expected = torch.zeros(7, 2, dtype=torch.long)             # (0, 2) has three words
        expected[3, 1], expected[2, 0], expected[5, 1] = 1, 2, 2
        self.assertTrue(torch.equal(gold_clusters(batch, clusters, 2), expected))

    def test_distance_features(self):
        """1, 2, 3, 4, 5-7, 8-15, 16-31, 32-63, 64+, as in Clark & Manning 2016."""
        head, _ = self.parts([["a"]], [])
        left, _, _, phi = head.pair.parts
        head.pair.upper = nn.Identity()
        nn.init.zeros_(left.bias)
        nn.init.zeros_(head.narrow.bias)
        nn.init.constant_(phi.weight, 1 / 20)
        head.distance.weight.data = torch.arange(9.0)[:, None].expand(9, 20)
        scores = head.antecedent_scores(torch.zeros(90), torch.zeros(90, left.in_features))
        expected = [0, *(d - 1 if d < 5 else 2 + int(math.log2(d)) for d in range(1, 71))]
        torch.testing.assert_close(scores[89], torch.tensor(expected).float())
        self.assertEqual(scores[1].tolist(), [0.0, 0.0, *[-math.inf] * 69])

    def test_span_representations_are_dropped(self):
        head, inputs = self.parts(self.SENTENCES, [], spans_per_token=2.0, dropout=0.5)
        width_feature = head.keep_spans(*inputs)[3][:, -20:]
        self.assertAlmostEqual((width_feature == 0).double().mean().item(), 0.5, delta=0.1)

    def test_clusters_follow_the_antecedents(self):
        head, inputs = self.parts([["a", "b", "c", "d", "e"]], [], max_span=1, spans_per_token=1.0)

        back = [0, 0, 2, 0, 3]                   # how far back the antecedent is, 0: none
        head.antecedent_scores = lambda *_: nn.functional.one_hot(torch.tensor(back), 5).float()
        self.assertEqual(head.decode(*inputs), [[[(0, 0), (2, 2)], [(1, 1), (4, 4)]]])
        self.assertEqual(clusters_of("abcdefg", [0, 1, 0, 2, 1, 0, 4]), [[*"abde"], [*"cg"]])


# ------------------------------------------------------------------------------- the whole model

class ModelTest(unittest.TestCase):

    def test_alone_equals_batched_equals_overpadded(self):
        self.check_alone(*tiny_model())

    def test_questions_alone_equal_batched_equal_overpadded(self):
        self.check_alone(*tiny_model(settings=replace(TINY, sharing="question")))

    def check_alone(self, tasks, vocabulary, model):
        for task in tasks:
            documents = task.data["train"][:1 if task.whole_documents else 4]
            whole = make_batch(documents, vocabulary)
            loss, gradient = loss_and_gradient(model, task.name, whole)
            alone = [loss_and_gradient(model, task.name, make_batch([d], vocabulary))
                     for d in documents]
            wide = loss_and_gradient(model, task.name, overpadded(whole))
            with self.subTest(task.name):
                self.assertAlmostEqual(loss, np.mean([x for x, _ in alone]), places=4)
                self.assertAlmostEqual(loss, wide[0], places=4)
                for i, expected in enumerate(gradient):
                    mean = torch.stack([g[i] for _, g in alone]).mean(0)
                    torch.testing.assert_close(mean, expected, atol=2e-5, rtol=1e-4)
                    torch.testing.assert_close(wide[1][i], expected, atol=2e-5, rtol=1e-4)
                model.eval()
                predictions = model.predict(whole)[task.name]
                self.assertEqual(predictions, model.predict(overpadded(whole))[task.name])
                if not task.whole_documents:
                    self.assertEqual(predictions, [model.predict(make_batch([d], vocabulary))
                                                   [task.name][0] for d in documents])

    def test_character_features_equal_a_convolution_word_by_word(self):
        _, vocabulary, model = tiny_model(("ner",))
        words, embedder = ["a", "Kellstadburg", "it", "Zor", "Ad"], model.embedder
        batch = make_batch([Document("d", [words])], vocabulary)
        found = embedder(batch)[0, :, -TINY.char_filters:]
        weight = embedder.filters.weight.view(-1, 3, TINY.char_dim).transpose(1, 2)
        for word, features in zip(words, found):
            ids = torch.tensor([vocabulary.char_ids.get(c, 1) for c in word])
            expected = nn.functional.conv1d(embedder.chars(ids).T[None], weight,
                                            embedder.filters.bias, padding=1).relu().amax(2)[0]
            torch.testing.assert_close(features, expected)
        self.assertEqual(embedder.chars.weight[:2].abs().sum().item(), 0.0)   # padding, unknown

    def test_hierarchy_from_the_table_for_all_subsets(self):
        self.assertEqual(HIERARCHY["rel"], HIERARCHY["coref"])
        self.assertEqual([layout("hierarchical", s)[0]["rel"] for s in
                          (ALL, ("ner", "rel"), ("rel", "coref"))], [["emd"], ["ner"], []])
        encoders = tiny_model(n=2)[2].encoders.values()
        for lstms in ("forwards", "backwards"):
            self.assertEqual([f"{len(getattr(e, lstms))}x{e.width // 2}" for e in encoders],
                             [getattr(TINY, f"{name}_encoder") for name in ALL])
        settings = Settings(encoder="3x4", emd_encoder="1x5")      # the others take `encoder`
        encoders = tiny_model(settings=settings, n=2)[2].encoders.values()
        self.assertEqual([(len(e.forwards), e.width // 2) for e in encoders],
                         [(3, 4), (1, 5), (3, 4), (3, 4)])
        for size in range(1, 5):
            for names in itertools.combinations(ALL, size):
                tasks, vocabulary, model = tiny_model(names, n=4)
                self.assertEqual(set(model.encoders), set(names))
                for task in tasks:
                    loss, gradient = loss_and_gradient(
                        model, task.name, make_batch(task.data["train"][:1], vocabulary))
                    self.assertTrue(np.isfinite(loss))
                    model.eval()(task.name, make_batch(task.data["dev"][:1], vocabulary))
                    self.assertIn(task.validation_metric_name, model.get_metrics(task.name))
                document = Document("d", [["Ada", "Kell"], [], ["left", "."]])
                found, = annotate(model, [document], vocabulary)
                self.assertEqual({*found.annotations}, {task.annotation for task in tasks})
                self.assertEqual(json.loads(to_json(found))["sentences"], document.sentences)

    def test_gradient_reach(self):
        tasks, vocabulary, model = tiny_model()

        def reached(name):
            task = next(t for t in tasks if t.name == name)
            model.zero_grad()
            model.train()(name, make_batch(task.data["train"][:2 - task.whole_documents],
                                           vocabulary))["loss"].backward()
            return {key for key, part in [*model.encoders.items(), ("words", model.embedder)]
                    if any(p.grad is not None and p.grad.abs().sum() > 0
                           for p in part.parameters())}
        for sharing, expected in [
                ("hierarchical", [{"ner"}, {"ner", "emd"}, {"ner", "emd", "rel"},
                                  {"ner", "emd", "coref"}]),
                ("inverted", [set(ALL), {"emd", "rel", "coref"}, {"rel"}, {"coref"}]),
                ("flat", [set(ALL)] * 4), ("latent", [set(ALL)] * 4),
                ("question", [set(ALL)] * 4)]:
            tasks, vocabulary, model = tiny_model(settings=replace(TINY, sharing=sharing))
            for name, encoders in zip(ALL, expected):
                self.assertEqual(reached(name), {"words", *encoders}, sharing)

    def test_every_sharing_for_all_subsets(self):
        for size in range(1, 5):
            for names in itertools.combinations(ALL, size):
                for sharing in ("flat", "inverted", "latent", "question"):
                    settings = replace(TINY, sharing=sharing)
                    tasks, vocabulary, model = tiny_model(names, settings, n=2)
                    self.assertEqual(set(model.encoders), set(names))
                    for task in tasks:
                        batch = make_batch(task.data["train"][:1], vocabulary)
                        self.assertTrue(model.train()(task.name, batch)["loss"].isfinite())
                        self.assertEqual(len(model.eval().predict(batch)[task.name]), 1)

    def question_model(self):
        """With answers to every question; the heads' layers, and [q; c] of each head's questions."""
        tasks, vocabulary, model = tiny_model(settings=replace(TINY, sharing="question"))
        with torch.no_grad():
            model.heads["ner"].reader.weight *= 5
            model.heads["ner"].first.weight *= 5
            model.heads["ner"].second.weight *= 5
            model.heads["ner"].reader.bias[-1] = 4.5
        return tasks, vocabulary, model.eval()

    def asked(self, model, vocabulary, questions):
        rows = []
        for words in questions:
            batch = make_batch([Document("q", [words])], vocabulary)
            embedded = model.embedder(batch)[0]                    # without dropout
            rows.append(model.heads["rel"].reader(embedded.mean(0)))
        return rows

    def test_questions_against_single_pairs(self):
        tasks, vocabulary, model = self.question_model()
        heads = model.heads
        self.assertEqual(heads["ner"].questions(), [["ner", "LOC"], ["ner", "ORG"], ["ner", "PER"]])
        self.assertIn(["rel", "Works", "For"], heads["rel"].questions())
        self.assertEqual(len({id(heads[name].first) for name in ("ner", "emd", "rel")}), 1)
        self.assertIs(type(heads["coref"]), CorefHead)            # has no questions
        for name in ("ner", "rel"):
            task = next(t for t in tasks if t.name == name)
            batch = make_batch(task.data["train"][:3], vocabulary)
            embedded, inputs = model.encode(batch, [name])
            x, head = inputs[name], heads[name]
            rows = self.asked(model, vocabulary, head.questions())
            loss, found = 0.0, []
            for b, (n, gold) in enumerate(zip(batch.lengths, head.gold(batch))):
                gold = {(r[1], r[3], r[4]) for r in gold} if name == "rel" else {*gold}
                logits = {}
                for i, j, (label, row) in itertools.product(range(n), range(n),
                                                            zip(head.labels, rows)):
                    hidden = torch.relu(head.first(x[b, i]) + head.second(x[b, j]))
                    p = torch.sigmoid(row[:-1] @ hidden + row[-1]).item()
                    logits[i, j, label] = p
                    loss -= math.log(p if (i, j, label) in gold else 1 - p)
                answers = sorted((k for k, p in logits.items() if p > 0.5), key=lambda k: -logits[k])
                if name == "ner":                      # the most probable first, without overlaps
                    kept = []
                    for i, j, label in answers:
                        if i <= j and all(j < a or b < i for a, b, _ in kept):
                            kept.append((i, j, label))
                    answers = kept
                found.append(sorted(answers))
            self.assertAlmostEqual(head.loss(x, embedded, batch).item(), loss / 3, delta=loss / 1e3)
            decoded = [sorted(rows) for rows in head.decode(x, embedded, batch)]
            self.assertEqual(decoded, found)
            self.assertTrue(any(found))

    def test_labels_of_any_script_are_questions(self):
        head = self.question_model()[2].heads["rel"]
        head.labels = ["\u4eba", "\u7ec4\u7ec7_2", "OrgBased_In", "USED-FOR", "\u00a7"]
        self.assertEqual([" ".join(words) for words in head.questions()],
                         ["rel \u4eba", "rel \u7ec4\u7ec7 2", "rel Org Based In", "rel USED FOR",
                          "rel \u00a7"])

    def test_an_untrained_question(self):
        """A label that no training document has can be asked for: its words are its weights."""
        tasks, vocabulary, model = self.question_model()
        batch = make_batch(tasks[2].data["train"][:3], vocabulary)
        embedded, inputs = model.encode(batch, ["rel"])
        head = model.heads["rel"]
        head.labels = ["Kill", "Works_For"]
        questions = Document("", [["rel"], *head.questions()])
        head.asked = make_batch([questions], vocabulary)
        rows = self.asked(model, vocabulary, [["rel", "Kill"], ["rel", "Works", "For"]])
        for x, logits, n in zip(inputs["rel"], head.logits(inputs["rel"], batch), batch.lengths):
            hidden = torch.relu(head.first(x[:n])[:, None] + head.second(x[:n]))
            expected = torch.stack([hidden @ row[:-1] + row[-1] for row in rows], 2)
            torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-4)
        found = head.decode(inputs["rel"], embedded, batch)
        self.assertEqual({label for row in found for *_, label in row} - {*head.labels}, set())

    def test_questions_start_improbable_in_one_stack_and_read_frozen_words(self):
        self.assertEqual(layout("question", ALL), layout("flat", ALL))
        tasks = tiny_tasks()
        labels = {task.name: task.labels() for task in tasks}
        vocabulary = Vocabulary.from_documents([d for t in tasks for d in t.data["train"]], ["per"])
        vectors = ["per"], torch.ones(1, 8)
        settings = replace(TINY, sharing="question", unknown=1.0)
        model = HMTL(tasks, labels, vocabulary, settings, vectors)
        self.assertEqual(model.heads["rel"].reader.bias[-1].item(), -7.0)
        for task in tasks:
            loss, _ = loss_and_gradient(model, task.name,
                                        make_batch(task.data["train"][:1], vocabulary))
            self.assertTrue(math.isfinite(loss))

    def test_latent_mixture_is_a_softmax_of_weights(self):
        tasks, vocabulary, model = tiny_model(settings=replace(TINY, sharing="latent"))
        batch = make_batch(tasks[0].data["train"][:2], vocabulary)
        direct = tiny_model()[2]                                   # the same, without mixtures
        direct.encoders, direct.embedder = model.encoders, model.embedder
        for i, name in enumerate(ALL):
            model.mixtures["rel"].data = torch.tensor([-1e9] * i + [1e9] + [-1e9] * (3 - i))
            mixed = model.encode(batch, ["rel"])[1]["rel"]
            plain = direct.encode(batch, [name])[1][name]
            width = plain.shape[2]
            torch.testing.assert_close(mixed[:, :, :width], plain)
            self.assertEqual(mixed[:, :, width:].abs().sum().item(), 0.0)
        model.mixtures["rel"].data = torch.tensor([1.0, 2.0, 3.0, 4.0]).log()
        mixed = model.encode(batch, ["rel"])[1]["rel"]
        expected = 0                                               # the shares are 0.1 to 0.4
        for i, name in enumerate(ALL, 1):
            plain = direct.encode(batch, [name])[1][name]
            expected += i / 10 * nn.functional.pad(plain, (0, mixed.shape[2] - plain.shape[2]))
        torch.testing.assert_close(mixed, expected)

    def test_prediction_runs_every_encoder_once(self):
        _, vocabulary, model = tiny_model()
        calls = []
        for name, encoder in model.encoders.items():
            encoder.register_forward_hook(
                lambda *inputs, name=name: calls.append((name, inputs[-1].requires_grad)))
        document = builtin_documents(1, np.random.default_rng(5))[0]
        model.eval().predict(make_batch([document], vocabulary))
        self.assertEqual(sorted(calls), [(name, False) for name in sorted(ALL)])   # no gradient
        calls.clear()
        list(annotate(model, [document], vocabulary))
        self.assertEqual(calls, [(name, False) for name in ALL])

    def test_annotations_have_document_offsets(self):
        tasks, vocabulary, model = tiny_model(("ner", "rel"))
        words = [["x", "Ada"], [], ["Bo", "left"]]
        model.heads["ner"].decode = lambda *_: [[(1, 1, "PER")], [(0, 0, "PER"), (1, 1, "ORG")]]
        model.heads["rel"].decode = lambda *_: [[], [(0, 1, "A"), (1, 5, "A")]]
        document = Document("d", words)
        found, = annotate(model.eval(), [document], vocabulary)
        self.assertEqual(found.annotations, {
            "ner": [[(1, 1, "PER")], [], [(2, 2, "PER"), (3, 3, "ORG")]],
            "relations": [[], [], [(2, 2, 3, 3, "A")]]})
        tasks, vocabulary, model = tiny_model(("rel",))           # an argument is its last token
        model.heads["rel"].decode = lambda *_: [[(1, 0, "A")], [(0, 1, "A")]]
        found, = annotate(model.eval(), [document], vocabulary)
        self.assertEqual(found.annotations,
                         {"relations": [[(1, 1, 0, 0, "A")], [], [(2, 2, 3, 3, "A")]]})

    def test_annotated_alone_equals_annotated_together(self):
        whole = builtin_documents(4, np.random.default_rng(6))
        for names in (ALL, ALL[:3]):                 # documents at once, sentence by sentence
            _, vocabulary, model = tiny_model(names)
            nn.init.zeros_(model.eval().heads["rel"].label.bias)    # so that there are relations
            if "coref" in names:                                    # and clusters
                nn.init.constant_(model.heads["coref"].pair.upper[-1].bias, 0.6)
            for documents in (cut_documents(whole, 1), [
                    *whole, Document("empty", [[], []]), Document("e", [[], ["Ada"], [], ["x"]])]):
                together = list(annotate(model, documents, vocabulary))
                alone = [next(annotate(model, [document], vocabulary)) for document in documents]
                self.assertEqual(together, alone)
                for task in model.tasks.values():
                    rows = [d.annotations[task.annotation] for d in together]
                    self.assertTrue(any(map(any, rows)), task.name)
                    if not task.whole_documents:
                        self.assertEqual(list(map(len, rows)),
                                         [len(d.sentences) for d in documents])
        sentences = [words for d in whole for words in d.sentences]
        expected = list(predict_sentences(model, sentences, vocabulary))
        self.assertTrue(any(row["rel"] for row in expected))
        for window, size in [(7, 3), (1, 1), (20, 32)]:
            found = list(predict_sentences(model, sentences, vocabulary, window=window, size=size))
            self.assertEqual(found, expected)

    def test_metrics_are_kept_by_the_model(self):
        tasks, vocabulary, model = tiny_model()
        model.eval()
        gold = tasks[2].data["dev"][:6]
        batch = make_batch(gold, vocabulary)
        model.heads["rel"].decode = lambda *_: [
            [(r[1], r[3], r[4]) for r in d.annotations["relations"][0]] for d in gold]
        model.heads["emd"].decode = lambda *_: [d.annotations["emd"][0] for d in gold]
        model("rel", batch)
        scores = model.get_metrics("rel", reset=True)
        self.assertEqual([scores[k] for k in ("last-token", "boundaries", "strict")], [100.0] * 3)
        self.assertEqual(model.get_metrics("rel"), {})
        model.heads["emd"].decode = lambda *_: [
            [(s, e, "NEW") for s, e, _ in d.annotations["emd"][0]] for d in gold]
        model("rel", batch)
        scores = model.get_metrics("rel")
        self.assertEqual((scores["last-token"], scores["boundaries"]), (100.0, 100.0))
        self.assertEqual(scores["strict"], 0.0)

    def test_rare_words_become_unknown_in_training_only(self):
        documents = [Document("d", [["often", "once", "Once"]]), Document("e", [["Often"]])]
        vocabulary = Vocabulary.from_documents(documents + documents, ["often", "vector"])
        self.assertEqual(vocabulary.words, ["", "<unknown>", "often", "once", "vector"])
        vectors = ["often", "vector"], torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        batch = make_batch([Document("d", [["Often", "once", "new"]])], vocabulary)
        for rare, is_unknown in [(1, [False, True, True]), (2, [True, True, True])]:
            settings = replace(TINY, rare=rare, unknown=1.0, word_dim=2)
            model = HMTL(choose_tasks(["ner"]), {"ner": []}, vocabulary, settings, vectors)
            table = model.embedder.words.trained.weight
            self.assertEqual(table[2].tolist(), [1, 2])
            for training, rows in [(True, np.where(is_unknown, 1, [2, 3, 1])), (False, [2, 3, 1])]:
                seen = model.embedder.train(training)(batch)[0, :, :2]
                self.assertEqual(seen.tolist(), table[rows].tolist())
        batch = make_batch([Document("d", [["vector"]])], vocabulary)
        for training in (True, False):                  # in training a question may have it
            seen = model.embedder.train(training)(batch)
            self.assertEqual(seen[0, 0, :2].tolist(), [3, 4])
        self.assertEqual(table.shape, (4, 2))                     # "vector" is not trained


# --------------------------------------------------------------------------------------- scores

class ScoreTest(unittest.TestCase):

    def f1(self, count, predicted, gold):
        scores = Scores()
        scores.add({"x": count(predicted, gold)})
        found = scores.compute()
        return [round(found[k] / 100, 3) for k in ("x-precision", "x-recall", "x")]

    def test_worked_examples(self):
        # Pradhan et al. 2014, Scoring Coreference Partitions of Predicted Mentions, section 4
        gold, found = ["abc", "defg"], ["ab", "cd", "fghi"]
        self.assertEqual(self.f1(muc, found, gold), [0.4, 0.4, 0.4])
        self.assertEqual(self.f1(b_cubed, found, gold), [0.5, 0.417, 0.455])
        self.assertEqual(self.f1(ceaf_e, found, gold), [0.433, 0.65, 0.52])
        # Bagga & Baldwin 1998 and Luo 2005: 12345 67 89ABC with two of the clusters merged
        gold, one, two = ["12345", "67", "89ABC"], ["12345", "6789ABC"], ["1234589ABC", "67"]
        self.assertEqual(self.f1(muc, one, gold)[:2], [0.9, 1.0])
        self.assertEqual(self.f1(muc, two, gold)[:2], [0.9, 1.0])
        self.assertEqual(self.f1(b_cubed, one, gold)[:2], [0.762, 1.0])
        self.assertEqual(self.f1(b_cubed, two, gold)[:2], [0.583, 1.0])
        self.assertEqual(self.f1(ceaf_e, one, gold)[2], 0.733)
        self.assertEqual(self.f1(ceaf_e, two, gold)[2], 0.667)
        # Singletons are ordinary clusters; nothing found is nothing right, and 0 / 0 is 0.
        self.assertEqual(self.f1(b_cubed, ["a", "b"], ["ab"]), [1.0, 0.5, 0.667])
        self.assertEqual(self.f1(muc, ["a", "b"], ["ab"]), [0.0, 0.0, 0.0])
        for count in COREF_SCORES.values():
            self.assertEqual(self.f1(count, [], ["ab"]), [0.0, 0.0, 0.0])
            self.assertEqual(self.f1(count, [], []), [0.0, 0.0, 0.0])

    def test_assignment_against_all_permutations(self):
        rng = np.random.default_rng(0)
        for _ in range(300):
            value = rng.random(rng.integers(0, 6, 2)) * (rng.random() < 0.8)
            value *= rng.random(value.shape) < 0.7
            small = value if len(value) <= value.shape[1] else value.T
            best = max(sum(small[i, j] for i, j in enumerate(p))
                       for p in itertools.permutations(range(small.shape[1]), len(small)))
            self.assertAlmostEqual(best_matching_sum(value), best, places=9)

    def test_assignment_against_sums_for_every_set_of_columns(self):
        rng = np.random.default_rng(1)
        for _ in range(100):                 # large enough for paths of several swaps
            value = rng.random((8, 8)) * (rng.random((8, 8)) < 0.7)
            best = {0: 0.0}                  # columns taken so far, as bits: the best sum
            for row in value:
                longer = {}
                for taken, total in best.items():
                    for j in range(8):
                        if not taken >> j & 1:
                            columns = taken | 1 << j
                            longer[columns] = max(longer.get(columns, 0.0), total + row[j])
                best = longer
            self.assertAlmostEqual(best_matching_sum(value), best[255], places=9)

    def test_documents_add_up_before_the_division(self):
        scores = Scores()
        scores.add({"x": count_rows([(0, 1, "A")], [(0, 1, "A"), (3, 3, "B")])})
        scores.add({"x": count_rows([(0, 1, "A"), (2, 2, "B"), (4, 4, "B")], [(0, 1, "B")])})
        found = scores.compute()
        self.assertAlmostEqual(found["x-precision"], 100 / 4)
        self.assertAlmostEqual(found["x-recall"], 100 / 3)
        self.assertAlmostEqual(found["x"], 200 / 7)
        coref = Scores("mean")
        coref.add({name: count(["ab", "cd", "fghi"], ["abc", "defg"])
                   for name, count in COREF_SCORES.items()})
        self.assertAlmostEqual(coref.compute()["mean"], 100 * (0.4 + 5 / 11 + 0.52) / 3)

    def test_confusions_and_scores_of_labels(self):
        gold = [(0, 1, "A"), (0, 1, "B"), (3, 3, "A"), (4, 4, "A")]
        found = [(0, 1, "C"), (0, 1, "B"), (4, 4, "A"), (5, 6, "B"), (5, 6, "A")]
        pairs = confusions(found, gold)
        self.assertEqual(pairs, {("B", "B"): 1, ("A", "C"): 1, ("A", None): 1, ("A", "A"): 1,
                                 (None, "A"): 1, (None, "B"): 1})
        rows = label_scores(pairs)
        self.assertEqual([(label, row["gold"], row["predicted"], row["f1-precision"])
                          for label, row in rows.items()],
                         [("A", 3, 2, 50.0), ("B", 1, 2, 50.0), ("C", 0, 1, 0.0)])
        self.assertAlmostEqual(rows["A"]["f1-recall"], 100 / 3)
        self.assertAlmostEqual(rows["A"]["f1"], 40.0)
        self.assertEqual(label_scores(confusions([], [])), {})
        rng = np.random.default_rng(0)
        for _ in range(50):
            gold, found = ([(*sorted(row[:2]), "ABC"[row[2]]) for row in rng.integers(
                3, size=(rng.integers(9), 3)).tolist()] for _ in range(2))
            pairs = confusions(found, gold)
            rows = label_scores(pairs)
            sums = [sum(row[side] for row in rows.values()) for side in ("predicted", "gold")]
            hits = sum(n for (right, label), n in pairs.items() if right == label)
            self.assertEqual((hits, sums[0], hits, sums[1]), count_rows(found, gold))

    def test_spans_as_conlleval_reads_them(self):
        for tags, spans in [("B-X I-X O B-X", [(0, 1, "X"), (3, 3, "X")]),
                            ("I-X I-X B-X I-Y", [(0, 1, "X"), (2, 2, "X"), (3, 3, "Y")]),
                            ("O I-X O I-X", [(1, 1, "X"), (3, 3, "X")]),
                            ("S-X S-X B-X E-X I-X", [(0, 0, "X"), (1, 1, "X"), (2, 3, "X"),
                                                     (4, 4, "X")]),
                            ("U-X B-Y I-Y L-Y L-Y", [(0, 0, "X"), (1, 3, "Y"), (4, 4, "Y")]),
                            ("S-X I-X U-X E-X", [(t, t, "X") for t in range(4)])]:
            self.assertEqual(spans_of(tags.split()), spans, tags)


# ------------------------------------------------------------------------------------- training

def train_20_steps(rank, n_processes, folder):
    """(weights, dev scores, losses) of 20 steps of all tasks; of several processes the first saves."""
    if n_processes > 1:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=n_processes)
    tasks, vocabulary, model = tiny_model()
    model.double()                   # where a gradient is 0, Adam makes full steps out of rounding
    settings = replace(TINY, batch_size=5)                        # shares of 3 and 2
    trainer = train.MultiTaskTrainer(model, tasks, vocabulary, settings, folder)
    model.train()
    losses = torch.stack([trainer.train_step(tasks[i % 4]) for i in range(20)])
    found = model.state_dict(), [trainer.evaluate(task, "dev") for task in tasks], losses
    if n_processes > 1:
        if rank == 0:
            train.write(Path(folder) / "two.pt", found)
        dist.barrier()                       # see train.run
        dist.destroy_process_group()
    return found


class TrainingTest(unittest.TestCase):

    def test_sampled_frequencies_and_same_draws(self):
        p = train.sampling_probabilities("proportional", [60, 30, 10])
        self.assertEqual(p.tolist(), [0.6, 0.3, 0.1])
        self.assertEqual(train.sampling_probabilities("uniform", [60, 40]).tolist(), [0.5, 0.5])

        def draws(seed):
            rng = np.random.default_rng(seed)
            return [train.choose_task(p, rng) for _ in range(5000)]
        self.assertEqual(draws(0), draws(0))
        self.assertNotEqual(draws(0), draws(1))
        counts = np.bincount(draws(0)) / 5000
        self.assertTrue(np.allclose(counts, p, atol=0.02), counts)

    def test_best_epoch_and_patience(self):
        for scores, best, waited in [([0.0], 0, 0), ([0.0, 0.0, 0.0], 0, 0), ([1.0, 1.0], 0, 1),
                                     ([1.0, 2.0], 1, 0), ([3.0, 1.0, 2.0], 0, 2),
                                     ([0.0, 4.0, 3.9, 4.0], 1, 2), ([0.0, 0.0, 1.0], 2, 0)]:
            self.assertEqual(train.best_epoch(scores), best)
            self.assertEqual(train.epochs_waited(scores), waited)
        trainer = tiny_trainer(("ner", "emd"))
        ner, emd = trainer.tasks
        ner.validation_metric_decreases = True
        trainer.history = [{"dev": {"ner": {"f1": a}, "emd": {"f1": b}}}
                           for a, b in [(3.0, 2.0), (1.0, 3.0), (2.0, 1.0)]]
        self.assertEqual(train.best_epoch(trainer.dev_scores(ner)), 1)
        self.assertEqual(trainer.dev_scores(emd), [2.0, 3.0, 1.0])
        self.assertEqual(trainer.mean_scores(), [-0.5, 1.0, -0.5])
        trainer.started, trainer.n_epochs = 0.0, 3
        with contextlib.redirect_stdout(io.StringIO()) as screen:
            train.print_epoch(trainer)
        self.assertIn("ner   2.0 ", screen.getvalue())            # not negated

    def test_every_batch_of_a_pass_once_and_alike_in_length(self):
        task = tiny_tasks(("ner",), n=50)[0]
        names = {id(d): i for i, d in enumerate(task.data["train"])}
        for epoch in (0, 1):
            batches = [task.batch(13 * epoch + i, 4, 0) for i in range(task.n_batches(4))]
            self.assertEqual(sorted(names[id(d)] for b in batches for d in b), list(range(50)))
        self.assertNotEqual([[id(d) for d in task.batch(n, 4, 0)] for n in range(13)],
                            [[id(d) for d in task.batch(n, 4, 0)] for n in range(13, 26)])
        lengths, shortest = range(1, 101), []
        first, second = [plan_batches(lengths, 10, np.random.default_rng(i)) for i in range(2)]
        for batch in first:
            chosen = [lengths[i] for i in batch]
            self.assertLess(max(chosen) - min(chosen), 35)
            shortest.append(min(chosen))
        self.assertNotEqual(shortest, sorted(shortest))
        self.assertFalse({frozenset(batch) for batch in first}
                         & {frozenset(batch) for batch in second})

    def run_of(self, folder, *epochs):
        """Trains to each number of epochs in turn, every time from what is on disk."""
        settings = replace(TINY, dropout=0.3, unknown=0.3, lr=1e-2, lr_patience=0, antecedents=9)
        for i, n in enumerate(epochs):
            tasks, vocabulary, model = tiny_model(settings=settings)
            trainer = train.MultiTaskTrainer(model, tasks, vocabulary, settings, folder)
            real = trainer.evaluate          # above 0, so that the learning rates fall
            trainer.evaluate = lambda *task: {k: v + 1 for k, v in real(*task).items()}
            if i:
                checkpoint = train.load(trainer.folder / "checkpoint.pt")
                model.load_state_dict(checkpoint["model"])
                train.restore_run(trainer, checkpoint)
            with contextlib.redirect_stdout(io.StringIO()):
                trainer.train(n)
        train.write_results(trainer)
        return trainer

    def test_resumed_equals_uninterrupted_and_two_runs_are_equal(self):
        with contextlib.ExitStack() as stack:
            folders = [Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in range(4)]
            one = self.run_of(folders[0], 4)
            for folder, epochs in zip(folders[1:], [(4,), (1, 2, 3, 4), (3, 4)]):
                other = self.run_of(folder, *epochs)
                for a, b in zip(one.model.state_dict().values(), other.model.state_dict().values()):
                    self.assertTrue(torch.equal(a, b), epochs)
                for name in ("log.jsonl", "results.json"):
                    self.assertEqual((folder / name).read_bytes(), (folders[0] / name).read_bytes())
                for name in ("best.pt", "best-rel.pt"):
                    a, b = train.load(folder / name), train.load(folders[0] / name)
                    self.assertEqual(set(a), {"settings", "vocabulary", "labels", "model"})
                    for x, y in zip(a.pop("model").values(), b.pop("model").values()):
                        self.assertTrue(torch.equal(x, y))
                    self.assertEqual(a, b)
            self.assertEqual(len((folders[0] / "log.jsonl").read_text().splitlines()), 4)

    def test_two_processes_equal_one(self):
        with tempfile.TemporaryDirectory() as folder:
            one = train_20_steps(0, 1, folder)
            torch.multiprocessing.spawn(train_20_steps, (2, folder), nprocs=2)
            weights, scores, losses = train.load(Path(folder) / "two.pt")
            torch.testing.assert_close(losses, one[2])
            for name, value in one[0].items():
                torch.testing.assert_close(weights[name], value, atol=1e-5, rtol=0)
            for found, expected in zip(scores, one[1]):
                self.assertEqual(found.keys(), expected.keys())
                for name in found:
                    self.assertAlmostEqual(found[name], expected[name])

    def test_shares_of_a_batch_weigh_alike(self):
        self.addCleanup(setattr, train, "processes", train.processes)
        for n in range(1, 4):
            shares = []
            for rank in range(n):
                train.processes = lambda: (rank, n)
                shares.append(train.own_share(range(12)))
            self.assertEqual(sorted(sum(shares, [])), [*range(12)])
            self.assertEqual({*map(sum, shares)}, {66 // n})
            self.assertEqual(train.weighted_share([7])[1], 0.0 if n > 1 else 1.0)

    def test_everything_random_depends_on_seed_epoch_and_process(self):
        def weights(seed):
            model = train.build(Settings(tasks=("rel",), seed=seed))[2]
            return [p for p in model.parameters() if p.ndim == 2]
        self.assertTrue(all(map(torch.equal, weights(0), weights(0))))
        self.assertFalse(any(map(torch.equal, weights(0), weights(1))))
        task, = tiny_tasks(("ner",), n=30)
        batches = [[[id(d) for d in task.batch(n, 4, seed)] for n in range(8)] for seed in (0, 1)]
        self.assertNotEqual(*batches)
        self.addCleanup(setattr, train, "processes", train.processes)

        def epoch(number, process=0, seed=0):
            """The plan of an epoch, and the random numbers of its steps."""
            trainer, drawn = tiny_trainer(seed=seed), []
            train.processes = lambda: (process, 2)
            trainer.train_step = lambda task: drawn.append((task.name, *torch.rand(1).tolist())) \
                or torch.zeros(1)
            trainer.train_epoch(number)
            return zip(*drawn)
        plan, numbers = epoch(0)
        self.assertEqual([*epoch(0)], [plan, numbers])
        for other in (epoch(1), epoch(0, seed=1)):
            self.assertFalse({plan, numbers} & {*other})
        other_plan, other_numbers = epoch(0, process=1)
        self.assertEqual(other_plan, plan)
        self.assertFalse({*other_numbers} & {*numbers})

    def test_every_task_has_its_own_adam_over_the_whole_model(self):
        trainer = tiny_trainer(("ner", "rel"), clip=1e-3)
        trainer.model.train()
        trainer.train_step(trainer.tasks[0])
        self.assertTrue(trainer.optimizers["ner"].state)
        self.assertFalse(trainer.optimizers["rel"].state)
        for optimizer in trainer.optimizers.values():
            self.assertEqual(list(map(id, optimizer.param_groups[0]["params"])),
                             list(map(id, trainer.model.parameters())))
        # The gradient is clipped, with what pulls to the anchor.
        trainer.anchor = [p.detach() + 1 for p in trainer.shared]
        for _ in range(2):
            gradient = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
            self.assertAlmostEqual(torch.cat(gradient).norm().item(), 1e-3, places=6)
            trainer.train_step(trainer.tasks[0])

    def test_a_step_knows_nothing_of_the_step_before(self):
        trainer, gradients = tiny_trainer(("ner",), lr=0.0, clip=1e9), []
        trainer.model.train()
        for _ in range(2):
            trainer.steps["ner"] = 0
            trainer.train_step(trainer.tasks[0])
            gradients.append(trainer.model.heads["ner"].emit.weight.grad.clone())
        torch.testing.assert_close(*gradients)
        for split in ("dev", "test", "dev"):                      # each starts from nothing
            scores = trainer.evaluate(trainer.tasks[0], split)
            metric = trainer.model.metrics["ner"]
            self.assertEqual(metric.compute(), scores)
            self.assertEqual(metric.sums["f1"][3], sum(
                len(d.annotations["ner"][0]) for d in trainer.tasks[0].data[split]))
            self.assertEqual(metric.sums["f1"][3], sum(
                n for (gold, _), n in metric.confusions.items() if gold))
        trainer.train_step = lambda task: torch.tensor(2.0)
        self.assertEqual(trainer.train_epoch(0), {"ner": 2.0})    # the mean loss, not the sum

    def test_a_full_disk_leaves_the_file_of_before(self):
        def full(file):
            raise OSError("disk full")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "best.pt"
            train.write(path, {"n": 1})
            self.addCleanup(setattr, os, "fsync", os.fsync)
            os.fsync = full
            with self.assertRaisesRegex(train.Stopped, "disk full"):
                train.write(path, {"n": 2})
            self.assertEqual(train.load(path), {"n": 1})
            self.assertEqual(os.listdir(folder), ["best.pt"])

    def test_learning_rate_is_halved_after_epochs_without_a_best(self):
        dev = {"ner": [0, 0, 0, 0, 10, 10.0005, 10.0005, 10, 5, 5, 20, 30],
               "emd": [1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 9]}
        with tempfile.TemporaryDirectory() as folder:
            trainer = tiny_trainer((*dev,), folder, lr_patience=1)
            trainer.train_epoch = lambda epoch: {}
            trainer.evaluate = lambda task, _: {"f1": float(dev[task.name][len(trainer.history)])}
            quietly(trainer.train, 12)
        rates = {name: [row["lr"][name] / TINY.lr for row in trainer.history] for name in dev}
        self.assertEqual(rates, {"ner": [1] * 8 + [0.5] * 2 + [0.25] * 2, "emd": [1] * 11 + [0.5]})

    def test_results_are_of_the_right_weights_and_documents(self):
        with tempfile.TemporaryDirectory() as folder:
            trainer = tiny_trainer(("ner", "rel"), folder)
            mark = trainer.model.heads["ner"].emit.bias.data
            dev = {"ner": [10, 40, 20, 30], "rel": [10, 10, 50, 0]}

            def marked(task, split):
                n = len(trainer.history)
                score = dev[task.name][n] if n < 4 else 10 * mark[0] + (split == "test")
                return {task.validation_metric_name: float(score)}
            trainer.train_epoch = lambda epoch: {"": mark.fill_(epoch + 1)[0].item()}
            trainer.evaluate = marked
            quietly(trainer.train, 4)
            trainer.steps = {"ner": 6, "rel": 3}                  # of 3 batches each
            results = train.write_results(trainer)
        with contextlib.redirect_stdout(io.StringIO()) as screen:
            train.print_results(trainer, results)
        for task, own, passes in zip(trainer.tasks, (2, 3), (2, 1)):
            row, score = results["tasks"][task.name], task.validation_metric_name
            for kind, epoch in [("own_best", own), ("one_model", 3)]:
                self.assertEqual(row[kind], {"dev": {score: 10 * epoch},
                                             "test": {score: 10 * epoch + 1}})
            self.assertEqual((row["best_epoch"], row["passes"]), (own, passes))
            best, last = max(dev[task.name]), dev[task.name][-1]
            self.assertEqual((row["best_dev"], row["last_dev"]), (best, last))
            self.assertRegex(screen.getvalue(),
                             rf"{task.name} +{score} +{own}1.00 +31.00 +{own}0.00")

    def test_schedules_visit_what_they_promise(self):
        def plan(schedule):
            return train.plan_epoch(schedule, [300, 200, 100], np.random.default_rng(0))
        self.assertEqual(plan("successive"), [0] * 300 + [1] * 200 + [2] * 100)
        for schedule, share in [("proportional", [0.5, 1 / 3, 1 / 6]), ("uniform", [1 / 3] * 3)]:
            counts = np.bincount(plan(schedule)) / 600
            self.assertTrue(np.allclose(counts, share, atol=0.05), counts)
            self.assertEqual(plan(schedule), plan(schedule))

    def test_shared_parameters(self):
        for sharing, name in itertools.product(("flat", "question"), ALL):
            trainer = tiny_trainer(sharing=sharing)
            shared, head = {*map(id, trainer.shared)}, trainer.model.heads[name]
            self.assertTrue(shared > {*map(id, trainer.model.encoders.parameters())})
            held = shared & {*map(id, head.parameters())}
            asked = sharing == "question" and name != "coref"
            self.assertEqual(len(held), len([*head.parameters()]) if asked else 0)
            self.assertEqual(len(shared), len(trainer.shared))    # each is held once

    def test_successive_regularization_on_two_parameters(self):
        trainer = tiny_trainer(("ner",), successive_delta=0.3)
        a, b = trainer.shared = [nn.Parameter(torch.tensor([1.0, 2.0])),
                                 nn.Parameter(torch.ones(1))]
        trainer.anchor = [torch.tensor([0.5, 4.0]), torch.tensor([1.5])]
        (a.sum() * 3 + b * 5).sum().backward()
        penalty = 0.3 * sum(((p - q) ** 2).sum() for p, q in zip(trainer.shared, trainer.anchor))
        expected = [g + h for g, h in zip((a.grad, b.grad), torch.autograd.grad(penalty, [a, b]))]
        train.hold_to_anchor(trainer)
        torch.testing.assert_close([a.grad, b.grad], expected)

    def test_successive_training_returns_to_the_task_before(self):
        trainer = tiny_trainer(("ner", "rel"), schedule="successive")
        heads = {id(p) for p in trainer.model.heads.parameters()}
        self.assertEqual({id(p) for p in trainer.shared},
                         {id(p) for p in trainer.model.parameters()} - heads)
        step, seen = trainer.train_step, []

        def watched(task):
            anchor = trainer.anchor and [p.clone() for p in trainer.anchor]
            seen.append((task.name, anchor, [p.detach().clone() for p in trainer.shared]))
            return step(task)
        trainer.train_step = watched
        trainer.train_epoch(0)
        trainer.train_epoch(1)
        self.assertEqual([name for name, _, _ in seen], (["ner"] * 3 + ["rel"] * 3) * 2)
        self.assertEqual([anchor for _, anchor, _ in seen[:3]], [None] * 3)
        for turn in (3, 6, 9):
            for _, anchor, _ in seen[turn:turn + 3]:
                self.assertTrue(all(map(torch.equal, anchor, seen[turn][2])))

    def test_best_weights_are_those_of_the_best_epoch(self):
        screen = io.StringIO()
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(screen):
            tasks, vocabulary, model = tiny_model(("ner",))
            trainer = train.MultiTaskTrainer(model, tasks, vocabulary, TINY, folder)
            fake = iter([10.0, 30.0, 20.0, 30.0, 5.0])
            trainer.evaluate = lambda task, split: {"f1": next(fake)}
            weights = []
            for n in range(1, 6):
                trainer.train(n)
                weights.append(copy.deepcopy(model.state_dict()))
            for name in ("best-ner.pt", "best.pt"):
                found = train.load(Path(folder) / name)["model"]
                self.assertTrue(all(torch.equal(found[k], weights[1][k]) for k in found))
            self.assertEqual(train.epochs_waited(trainer.dev_scores(tasks[0])), 3)
        self.assertEqual(re.findall(r"ner +\d+\.0(.?)", screen.getvalue()), ["*", "*", "", "", ""])

    def test_training_ends_when_every_task_has_waited(self):
        screen = io.StringIO()
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(screen):
            tasks, vocabulary, model = tiny_model(("ner", "emd"))
            trainer = train.MultiTaskTrainer(model, tasks, vocabulary, replace(TINY, patience=2),
                                             folder)
            scores = {"ner": [5, 4, 3, 2, 1, 0, 0], "emd": [0, 0, 1, 2, 1, 1, 1]}
            trainer.evaluate = lambda task, split: {
                "f1": float(scores[task.name][len(trainer.history)])}
            trainer.train(50)
            self.assertEqual(len(trainer.history), 6)             # emd is best in epoch 4
        cells = re.findall(r"emd +(\S+(?: \S+)?)", screen.getvalue())
        self.assertEqual(cells, ["none yet", "none yet", "1.0*", "2.0*", "1.0", "1.0"])

    def test_odd_documents_train_and_score(self):
        def document(sentences, label="A"):
            n, others = sum(map(len, sentences)), [[] for _ in sentences[1:]]
            return Document("d", sentences, {
                "ner": [[(0, 0, label)], *others], "emd": [[], *others],
                "relations": [[(0, 0, 0, 0, label)], *others],
                "clusters": [[(0, 0), (n - 1, n - 1)]]})
        empty = {"ner": [[]], "emd": [[]], "relations": [[]], "clusters": []}
        odd = [Document("one token", [["a"]], empty),
               document([["b"], [], ["c"]]), document([["a", "b"] * 1000], "once"),
               document([["x" * 1000, "\u00e9", "a"]])]
        tasks = choose_tasks(ALL)
        for task in tasks:               # emd has no span at all; every task has a single batch
            longest = sys.maxsize if task.whole_documents else 1
            task.data = dict.fromkeys(("train", "dev", "test"), cut_documents(odd, longest))
        settings = replace(TINY, batch_size=8)
        vocabulary = Vocabulary.from_documents(odd)
        model = HMTL(tasks, {task.name: task.labels() for task in tasks}, vocabulary, settings)
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            trainer = train.MultiTaskTrainer(model, tasks, vocabulary, settings, folder)
            for task in tasks:
                self.assertTrue(trainer.train_step(task).isfinite(), task.name)
            trainer.train(1)
            results = train.write_results(trainer)
            train.print_examples(trainer)
        self.assertEqual(results["tasks"]["emd"]["one_model"]["test"]["f1-recall"], 0.0)

    def test_a_loss_that_is_not_finite_stops_the_run(self):
        message = "ner is not finite at its step 4, in epoch 2"
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            tasks, vocabulary, model = tiny_model(("ner",))
            trainer = train.MultiTaskTrainer(model, tasks, vocabulary, TINY, folder)
            trainer.train(1)
            nn.init.constant_(model.heads["ner"].emit.bias, float("nan"))
            with self.assertRaisesRegex(train.Stopped, message):
                trainer.train(2)
            checkpoint = train.load(Path(folder) / "checkpoint.pt")
            self.assertEqual(len(checkpoint["history"]), 1)
            self.assertTrue(all(value.isfinite().all() for value in checkpoint["model"].values()))
            model.load_state_dict(checkpoint["model"])
            train.restore_run(trainer, checkpoint)
            model.heads["ner"].emit.bias.register_hook(lambda gradient: gradient * math.inf)
            with self.assertRaisesRegex(train.Stopped, message):
                trainer.train(2)
            self.assertTrue(all(value.isfinite().all() for value in model.state_dict().values()))

    def test_each_task_overfits_eight_sentences(self):
        settings = replace(TINY, ner_encoder="1x24", emd_encoder="1x24", rel_encoder="1x24",
                           coref_encoder="1x24", char_filters=16, word_dim=24, coref_units=24,
                           relation_units=24, spans_per_token=1.0, lr=1e-2)
        for name in ALL:
            tasks, vocabulary, model = tiny_model((name,), settings, n=30)
            task = tasks[0]
            documents = task.data["train"]
            if name == "coref":                                   # two documents, 10 sentences
                documents = documents[:2]
            else:
                documents = [d for d in documents if d.annotations[task.annotation][0]][:8]
            size = 1 if task.whole_documents else 8
            batches = [make_batch(documents[i:i + size], vocabulary)
                       for i in range(0, len(documents), size)]
            optimizer = torch.optim.Adam(model.parameters(), settings.lr)
            for _ in range(60):
                for batch in batches:
                    model.zero_grad()
                    model.train()(name, batch)["loss"].backward()
                    nn.utils.clip_grad_norm_(model.parameters(), 5.0)
                    optimizer.step()
            for batch in batches:
                model.eval()(name, batch)
            self.assertEqual(model.get_metrics(name)[task.validation_metric_name], 100.0, name)


# ---------------------------------------------------------------------------------- input, corpus

def mutated(data, rng):
    """The bytes with one to three small damages."""
    for _ in range(rng.randint(1, 3)):
        i, j = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        odd = rng.choice([b"null", b"-1", b"1e999", b"99999999999999999999", b"[]", b"{}", b"true",
                          b'"', b"[[[[", b"\\ud800", b"\xff", b"\n", b"\t", b"\0", b" ", b"0.5",
                          b"", "\u2028é".encode(), b"NaN", b"I-X", bytes([rng.randrange(256)])])
        numbers = [m.span() for m in re.finditer(rb"-?\d+|\[\]", data)] or [(i, j)]
        start, end = rng.choice([(i, i + 1), (i, i), (i, min(j, i + 20)), (j, len(data)),
                                 (0, i // 9), rng.choice(numbers), rng.choice(numbers)])
        data = data[:start] + odd + data[end:]
    return data


def fuzz(n, folder, seed=0):
    """Mutates n documents, column files, vector files and checkpoints each; returns how many were
    refused. A file is read with offsets that hold and survives a round trip, or is refused in one
    line; a checkpoint is read as it was, or refused."""
    rng, refused, path = random.Random(seed), 0, folder / "fuzzed"
    document = builtin_documents(1, np.random.default_rng(0))[0]
    columns = b"-DOCSTART- O\n\nAda B-PER\nKell I-PER\nleft O\n\nNew York\tS-LOC\n"
    vectors = b"the 1.5 -2 3e-1\nof 0 1 2\n. . 1 2 3\n"
    train.write(path, {"model": {"a": torch.arange(50.0)}, "words": ["the", "of"], "n": 3})
    checkpoint = path.read_bytes()

    def check_documents(documents):
        for d in documents:
            path.write_text(to_json(d), encoding="utf-8")
            assert read_json(path)[0] == replace(d, key=read_json(path)[0].key), d
            parts = cut_documents([d], 1)
            assert sum(len(p.sentences[0]) for p in parts) == len(d)
            assert all(0 <= r[0] <= r[1] < len(p.sentences[0])
                       for p in parts for r in p.annotations.get("ner", [[]])[0])

    def check_checkpoint(found):
        assert torch.equal(found["model"]["a"], torch.arange(50.0)) and found["n"] == 3
        assert found["words"] == ["the", "of"]
    for _ in range(n):
        for data, read, check in [
                (to_json(document).encode(), read_json, check_documents),
                (columns, lambda p: read_columns(p, "ner"), check_documents),
                (vectors, read_vectors, lambda found: len(found[0]) == len(found[1])),
                (checkpoint, train.load, check_checkpoint)]:
            path.write_bytes(mutated(data, rng))
            try:
                found = read(path)
            except InputError as error:
                assert "\n" not in str(error), error
                refused += 1
            else:
                check(found)
    return refused


class InputTest(unittest.TestCase):
    GOOD = {"doc_key": "d", "sentences": [["Ada", "Kell", "left"], ["Bo"]],
            "ner": [[[0, 1, "PER"]], [[3, 3, "PER"]]], "relations": [[[0, 1, 2, 2, "R"]], []],
            "clusters": [[[0, 1], [3, 3]]]}

    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        self.path = Path(self.folder.name) / "train.json"

    def refused(self, pattern, call, *arguments):
        with self.assertRaisesRegex(InputError, pattern) as caught:
            call(*arguments)
        self.assertNotIn("\n", str(caught.exception))

    def test_a_good_document(self):
        twice = {"extra": 1, "ner": [[[0, 1, "PER"]] * 2, [[3, 3, "PER"]]]}
        self.path.write_text("\ufeff\n" + json.dumps(self.GOOD | twice) + "\n")
        document, = read_json(self.path)
        self.assertEqual(document.annotations, {
            "ner": [[(0, 1, "PER")], [(3, 3, "PER")]], "relations": [[(0, 1, 2, 2, "R")], []],
            "clusters": [[(0, 1), (3, 3)]]})
        self.assertEqual(json.loads(to_json(document)), self.GOOD)
        parts = cut_documents([document], 1)
        self.assertEqual(parts[1].annotations["ner"], [[(0, 0, "PER")]])
        self.assertEqual(parts[1].annotations["relations"], [[]])
        self.assertNotIn("emd", parts[1].annotations)

    def test_malformed_documents(self):
        for changes, pattern in [
                ({"sentences": None}, "sentences as a list"), ({"sentences": [["a", 1]]}, "word"),
                ({"sentences": [["a", " "]]}, "word"), ({"sentences": "text"}, "sentences"),
                ({"doc_key": 3}, "doc_key"), ({"ner": [[]]}, "one list for each of the 2"),
                ({"ner": [[[0, 3, "PER"]], []]}, "0 <= start <= end < 3"),
                ({"ner": [[[1, 0, "PER"]], []]}, "0 <= start <= end < 3"),
                ({"ner": [[[-1, 0, "PER"]], []]}, "start"), ({"ner": [[], [[0, 0, "P"]]]}, "3 <="),
                ({"ner": [[[0, 1, 2]], []]}, r"\[int, int, str\]"), ({"ner": {}}, "list"),
                ({"ner": [[[0, True, "PER"]], []]}, "int"), ({"ner": [[[0.0, 1, "P"]], []]}, "int"),
                ({"ner": [[[0, 1]], []]}, "int"), ({"ner": [[3], []]}, "int"),
                ({"ner": [[[0, 1, ""]], []]}, "label"), ({"ner": [3, []]}, "a list"),
                ({"relations": [[[0, 1, 2, 4, "R"]], []]}, "start"),
                ({"relations": [[[0, 1, "R"]], []]}, "int, int, int, int, str"),
                ({"clusters": [[[0, 9]]]}, "0 <= start <= end < 4"), ({"clusters": 5}, "clusters"),
                ({"clusters": [[[0, 1]], [[0, 1]]]}, "at most one cluster"),
                ({"clusters": [[]]}, "clusters with spans"),
                ({"sentences": [["\ud800"]]}, "valid characters"),
                ({"ner": [[[0, 1, "\ud800"]], []]}, "characters")]:
            self.path.write_text(json.dumps(self.GOOD) + "\n" + json.dumps(self.GOOD | changes))
            self.refused(f"train.json, line 2.*{pattern}", read_json, self.path)
        for text in ['{"sentences": [', "[1, 2]", "nonsense", "[" * 100000, "1" * 5000]:
            self.path.write_text(text)
            self.refused("line 1: expected one JSON object", read_json, self.path)
        self.path.write_bytes(b'{"sentences": [["\xff"]]}')
        self.refused("UTF-8", read_json, self.path)

    def test_columns(self):
        path = self.path.with_suffix(".conll")
        path.write_text("-DOCSTART- -X- O O\n\nAda NNP B-PER\nKell NNP I-PER\nleft VBD O\n\n\n"
                        "New York\tB-LOC\n-DOCSTART- O\n10\xa0000 B-PER\n")
        documents = read_columns(path, "ner")
        self.assertEqual([d.sentences for d in documents],
                         [[["Ada", "Kell", "left"]], [["New York"]], [["10\xa0000"]]])
        self.assertEqual(documents[0].annotations, {"ner": [[(0, 1, "PER")]]})
        for text, pattern in [("Ada B-PER\nKell X-PER", "line 2: expected a tag"),
                              ("Ada", "line 1: expected a word and a tag"),
                              ("Ada B-", "expected a tag"), ("\tB-PER", "a word"),
                              ("\xa0 B-PER", "a word"),
                              ("Ada b-PER", "expected a tag")]:
            path.write_text(text)
            self.refused(pattern, read_columns, path, "ner")

    def test_vectors(self):
        for text, pattern in [("a 1 2\nb 1", "line 2: expected a word and 2 numbers"),
                              ("a 1 2\nb 1 x", "line 2"), ("a 1 nan", "line 1"), ("", "a word"),
                              ("a\n", "a word and its numbers")]:
            self.path.write_text(text)
            self.refused(pattern, read_vectors, self.path)
        self.path.write_text("2 3\nThe\t1 2  3\n. . 4 5 6\nthe 7 8 9\n")
        words, vectors = read_vectors(self.path)
        self.assertEqual((words, vectors.tolist()), (["the", ". ."], [[1, 2, 3], [4, 5, 6]]))

    def test_text(self):
        self.path.write_text("Dr. Ada Kell left the U.S. in 1998. She's (now) home! "
                             "She doesn't\n\nThe end")
        self.assertEqual(read_text(self.path).sentences, [
            "Dr. Ada Kell left the U.S. in 1998 .".split(), "She 's ( now ) home !".split(),
            "She does n't".split(), "The end".split()])
        self.path.write_text("He got $1.5m, 10%, 1,000 or a 2nd.")
        self.assertEqual(read_text(self.path).sentences,
                         ["He got $1.5m , 10% , 1,000 or a 2nd .".split()])
        self.path.write_text("word " * 700)
        with contextlib.redirect_stderr(io.StringIO()) as said:
            document = cut_sentences(read_text(self.path), "here")
        for rows in (document.sentences, document.annotations["offsets"]):
            self.assertEqual(list(map(len, rows)), [300, 300, 100])
        self.assertEqual(said.getvalue(), "here: cut: a sentence of more than 300 words\n")
        self.path.write_text(" \n")
        self.refused("some text", read_text, self.path)

    def sentences(self, text):
        """The sentences of raw text, which are the same if lines end as on Windows."""
        versions = []
        for version in (text, text.replace("\n", "\r\n")):
            self.path.write_bytes(version.encode())
            document = read_text(self.path)
            self.assertEqual([[version[a:b] for a, b in offsets]
                              for offsets in document.annotations["offsets"]], document.sentences)
            versions.append(document.sentences)
        self.assertEqual(*versions)
        return versions[0]

    def test_where_sentences_end(self):
        paragraph = "the firm of Ada Kell and Bo Zor in New Warwick, and also " * 4
        for text in ["It fell on Jan. 14, 2016.|He left St. Louis.|John F. Kennedy met Ana P. Ruiz",
                     "It began at 5 p.m. on Monday.|It ended at 6 p.m.|The firm left at 7 p.m. Bo",
                     "The small, i.e. Nordex, fell.|U.S. President Bo met Acme Co. Chairman Zor",
                     "He met Nordex Inc.|The firm is No. 5 of 9.|Is it?|No.|Ten left Acme Inc. Bo",
                     "Well... yes.|Well... Ada left.|He left ...|The firm stayed!|5 left.|Bo?!|Ada",
                     "From the U.S.?|Is it Acme Inc.?|See p. 12 of Gov. Bo.|What...?|Nobody",
                     "He left.|Étienne stayed.|Łódź fell. iPads rose.|“Öl” fell",
                     'He said: "I left."|"No!"|Bo said.|(It is so.)|“The firm left.”|She left.',
                     "Nordex\nbuys\na plant.", "Nordex buys a plant|\nAda left", "Ada|\n \nleft",
                     "Nordex buys a plant|\n\"Ada left,\" Bo said\nand left.|\nHe left.",
                     *(textwrap.fill(paragraph, width) for width in range(60, 100, 5))]:
            self.assertEqual(["".join(words) for words in self.sentences(text.replace("|", " "))],
                             ["".join(part.split()) for part in text.split("|")])

    def test_words_of_raw_text(self):
        # | stands between words that no space parts.
        for text in ["O'Brien and d'Aubert|, a 56-year-old|, met O’Brien-Zor on 3/4/2020 at 5:30|.",
                     "It paid $1.5bn or €2m|, 10%|, to Kell & Zor|, AT&T -- the 1990s|... (|2nd|)",
                     "See https://a.org/b?c=d_e/f and www.b.com/x|, or ada.kell@mail.b-c.org|.",
                     "She|'s here|, they do|n't|, we|'ll|, he ca|n’t|, I|'m|, Ada|’s|, I|'ve",
                     "we|'re told|, he|'d go|--|or not|, by Acme Co. on Jan. 4|, i.e. at 5 p.m."]:
            self.assertEqual([*itertools.chain(*self.sentences(text.replace("|", "")))],
                             text.replace("|", " ").split())

    def test_mutated_files_are_read_rightly_or_refused(self):
        fuzz(150, Path(self.folder.name))

    def test_folders(self):
        task = choose_tasks(["rel"])[0]
        self.refused("train.json", task.load_data, self.folder.name)
        for split in ("train", "dev", "test"):
            document = {k: v for k, v in self.GOOD.items() if split == "train" or k != "relations"}
            (self.path.parent / f"{split}.json").write_text(json.dumps(document))
        self.refused("dev documents with the key 'relations'", task.load_data, self.folder.name)
        self.path.write_text("")
        self.refused("train documents", task.load_data, self.folder.name)
        empty = self.GOOD | {"relations": [[] for _ in self.GOOD["sentences"]]}
        self.path.write_text(json.dumps(empty))
        self.refused("train documents.* found only empty", task.load_data, self.folder.name)
        tasks = choose_tasks(["ner", "rel"])
        for data in [("x", "rel=y"), ("rel=y", "x")]:
            self.assertEqual(train.data_folders(data, tasks), {"ner": "x", "rel": "y"})
        self.refused("one of the tasks", train.data_folders, ("foo=x",), tasks)
        self.refused("a folder for the task rel", train.data_folders, ("ner=x",), tasks)

    def test_long_documents_are_cut_between_sentences(self):
        sentences = ["a b".split(), "c d e".split(), [], ["f"], "g h i j".split()]
        document = Document("d", sentences, {"clusters": [
            [(0, 0), (1, 1), (5, 5), (6, 6)], [(2, 2), (9, 9)], [(3, 5), (2, 4), (0, 1)],
            [(7, 8)], [(4, 6)]]})

        def parts(limit):
            return quietly(cut_documents, [document], limit)
        for limit, expected in [(10, "abcdefghij"), (9, "abcdef ghij"), (5, "abcde fghij"),
                                (4, "ab cdef ghij"), (3, "ab cde f ghij"), (1, "ab cde f ghij")]:
            found = ["".join(map("".join, part.sentences)) for part in parts(limit)]
            self.assertEqual(found, expected.split())
        # Gone are a cluster of which one mention is left, and mentions across the cut.
        self.assertEqual([part.annotations["clusters"] for part in parts(5)],
                         [[[(0, 0), (1, 1)], [(2, 4), (0, 1)]], [[(0, 0), (1, 1)], [(2, 3)]]])
        for limit, said in [(5, "cut: 1 training documents longer than --max-tokens 5\n"),
                            (10, ""), (1, "")]:
            with contextlib.redirect_stdout(io.StringIO()) as output:
                cut_documents([document], limit)
            self.assertEqual(output.getvalue(), said)

    def test_only_training_documents_are_cut_and_single_spans_stay(self):
        row = {"sentences": [["Ada", "likes", "Bo"], ["Ada", "left"]],
               "clusters": [[[0, 0], [2, 2]], [[1, 1]]]}
        for split in ("train", "dev", "test"):
            (self.path.parent / f"{split}.json").write_text(json.dumps(row))
        task, = tasks = choose_tasks(["coref"])
        quietly(task.load_data, self.folder.name, 3)
        self.assertEqual([list(map(len, task.data[split])) for split in ("train", "dev", "test")],
                         [[3, 2], [5], [5]])
        self.assertEqual(task.data["train"][0].annotations["clusters"],
                         [[(0, 0), (2, 2)], [(1, 1)]])
        vocabulary = Vocabulary.from_documents(task.data["train"])
        model = HMTL(tasks, {"coref": []}, vocabulary, TINY).eval()
        model.heads["coref"].decode = lambda *_: [[[(0, 0), (2, 2)]]]
        model("coref", make_batch(task.data["test"], vocabulary))
        scores = model.get_metrics("coref")
        self.assertEqual((scores["ceaf_e-recall"], scores["ceaf_e-precision"]), (50.0, 100.0))

    def test_the_vocabulary_is_that_of_the_training_documents(self):
        for split in ("train", "dev", "test"):
            row = {"sentences": [[split, "a"]], "ner": [[[0, 0, f"L{split}"], [1, 1, "A"]]]}
            (self.path.parent / f"{split}.json").write_text(json.dumps(row))
        settings = replace(TINY, tasks=("ner",), data=(self.folder.name,))
        tasks, vocabulary, model = train.build(settings)
        self.assertEqual(vocabulary.words, ["", "<unknown>", "a", "train"])
        self.assertEqual(model.heads["ner"].labels, ["A", "Ltrain"])
        same = train.trained(train.MultiTaskTrainer(model, tasks, vocabulary, settings, "unused"))
        self.assertEqual(same["labels"], {"ner": ["A", "Ltrain"]})
        _, again, rebuilt = train.build(settings, same, self.path.parent)
        for part in ("words", "chars", "counts"):
            self.assertEqual(getattr(again, part), getattr(vocabulary, part))
        self.assertTrue(all(map(torch.equal, rebuilt.state_dict().values(),
                                model.state_dict().values())))
        for other in ({"labels": {"ner": ["X"]}}, {"vocabulary": {
                **same["vocabulary"], "words": ["", "b"], "counts": [1, 1]}}):
            self.refused("expected checkpoints of train.py", train.build, settings, same | other,
                         self.path.parent)

    def test_labels_unknown_to_training_are_misses(self):
        tasks, vocabulary, model = tiny_model(("ner", "rel"))
        document = Document("d", [["Ada", "left"]], {"ner": [[(0, 0, "NEW")]],
                                                     "relations": [[(0, 0, 1, 1, "NEW")]]})
        for name, score in (("ner", "f1"), ("rel", "last-token")):
            model.eval()(name, make_batch([document], vocabulary))
            self.assertEqual(model.get_metrics(name)[f"{score}-recall"], 0.0)

    def test_the_built_in_corpus_is_no_look_up(self):
        tasks = choose_tasks(ALL)
        for task in tasks:
            task.load_data()
            first = [task.data[split][0].sentences for split in ("train", "dev", "test")]
            self.assertEqual(len({json.dumps(sentences) for sentences in first}), 3)
        sizes = [sum(len(d.sentences) for d in task.data["train"]) for task in tasks]
        self.assertEqual(max(sizes), sizes[0])
        names = {split: {" ".join(d.sentences[0][a:b + 1]): label for task in tasks[:3]
                         for d in task.data[split] for a, b, label in d.annotations["ner"][0]}
                 for split in ("train", "test")}
        unseen = [name for name in names["test"] if name not in names["train"]]
        self.assertGreater(len(unseen), len(names["test"]) / 2)
        types, pairs = {}, {}
        for d in tasks[0].data["train"]:
            for a, b, label in d.annotations["ner"][0]:
                types.setdefault(" ".join(d.sentences[0][a:b + 1]), set()).add(label)
        self.assertGreater(sum(len(t) > 1 for t in types.values()), 10)
        for d in tasks[2].data["train"]:
            label = {(a, b): l for a, b, l in d.annotations["ner"][0]}
            related = {(r[:2], r[2:4]): r[4] for r in d.annotations["relations"][0]}
            for x, y in itertools.permutations(label, 2):
                pairs.setdefault((label[x], label[y]), []).append(related.get((x, y)))
        self.assertGreaterEqual(len(set(pairs["PER", "ORG"])), 3)  # two relations, and none
        words = [[w for s in d.sentences for w in s] for d in tasks[3].data["train"]]
        mentions = {" ".join(w[a:b + 1]).lower() for d, w in zip(tasks[3].data["train"], words)
                    for c in d.annotations["clusters"] for a, b in c}
        self.assertLessEqual({"he", "she", "the company", "the town"}, mentions)
        again = builtin_documents(300, np.random.default_rng([0, *b"ner"]))
        again = [d.sentences for d in cut_documents(again, 1)]
        self.assertEqual([d.sentences for d in tasks[0].data["train"]], again)


# ------------------------------------------------------------------------------------- the screen

class ScreenTest(unittest.TestCase):

    def printed(self, call, *arguments):
        with contextlib.redirect_stdout(io.StringIO()) as screen:
            call(*arguments)
        return screen.getvalue()

    def test_annotated_lines(self):
        document = Document("d", ["Ada Kell likes the firm".split(), [], ["She", "left", "it"]], {
            "ner": [[(0, 1, "PER")], [], [(5, 6, "X")]],
            "emd": [[(0, 1, "PER"), (0, 0, "A")], [], [(5, 5, "PER"), (6, 7, "Y")]],
            "relations": [[(3, 4, 0, 1, "R"), (0, 1, 3, 4, "S"), (0, 1, 3, 4, "P")], [], []],
            "clusters": [[(3, 4), (7, 7)], [(5, 5), (0, 1)]]})
        self.assertEqual(train.annotated_lines(document, document.annotations), [
            "[[Ada A] Kell PER #1] likes [the firm #2]", "    Ada Kell -- P -> the firm",
            "    Ada Kell -- S -> the firm", "    the firm -- R -> Ada Kell", "",
            "[[She PER #1] left X] [it #2]", "    left it Y"])         # it crosses "She left"
        self.assertEqual(train.annotated_lines(document, ["ner"]),
                         ["[Ada Kell PER] likes the firm", "", "[She left X] it"])

    def test_no_character_steers_the_screen(self):
        odd = "".join(map(chr, [*range(1, 32), *range(127, 160), 0x200e, 0x2028, 0x202e, 0x2066]))
        document = Document("d", [[f"a{odd}", "b", "é"]], {
            "ner": [[(0, 0, f"X{odd}"), (0, 1, "Y"), (1, 2, f"Z{odd}")]],
            "relations": [[(0, 0, 1, 1, f"R{odd}")]]})
        lines = train.annotated_lines(document, document.annotations)
        self.assertEqual(len(lines), 3)
        pairs = confusions(document.annotations["ner"][0], [(0, 0, f"Y{odd}")])
        lines += self.printed(train.print_labels, {"f1": 1.0}, pairs).split("\n")
        lines += train.column_lines([document, document], "ner")
        self.assertFalse({*odd} & {*"".join(lines)})
        self.assertIn(r"a\x01\x02", lines[0])
        self.assertIn("é", lines[0])

    def test_examples_show_the_key_if_they_are_wrong(self):
        trainer = tiny_trainer(("ner",))
        head = trainer.model.heads["ner"]
        gold = {tuple(d.sentences[0]): d.annotations["ner"][0]
                for d in trainer.tasks[0].data["dev"]}
        head.decode = lambda x, embedded, batch: [gold[tuple(d.sentences[0])]
                                                  for d in batch.documents]
        marks = [re.findall(r"^ +(right|wrong|gold) ", self.printed(train.print_examples, trainer),
                            re.M)]
        head.decode = lambda *_: [[]]
        marks.append(re.findall(r"^ +(right|wrong|gold) ",
                                self.printed(train.print_examples, trainer), re.M))
        trainer = tiny_trainer(("rel",))       # without a tagger an argument is its last token
        trainer.model.heads["rel"].decode = lambda x, embedded, batch: [
            [(i, j, label) for d in trainer.tasks[0].data["dev"] if d.sentences == document.sentences
             for _, i, _, j, label in d.annotations["relations"][0]]
            for document in batch.documents]
        marks.append(re.findall(r"^ +(right|wrong|gold) ",
                                self.printed(train.print_examples, trainer), re.M))
        self.assertEqual(marks, [["right"] * 2, ["wrong", "gold"] * 2, ["right"] * 2])

    def test_when_more_epochs_may_help(self):
        trainer = tiny_trainer(("ner",))
        trainer.history = [{}] * 2
        row = dict(own_best={"test": {}, "dev": {}}, one_model={"test": {}}, last_dev=1.0, steps=6,
                   passes=2.0)
        for best, score, more in [(2, 1.0, True), (1, 1.0, False), (1, 0.0, True)]:
            results = {"tasks": {"ner": row | {"best_epoch": best, "best_dev": score}},
                       "mixtures": {}, "one_model_epoch": 1}
            screen = self.printed(train.print_results, trainer, results)
            self.assertEqual(": --epochs 4 may help;" in screen, more)

    def test_what_is_not_learned(self):
        trainer = tiny_trainer(("ner", "coref"))
        document = Document("d", [["a"] * 12], {"ner": [[(0, 3, "A"), (3, 5, "A"), (6, 6, "A")]],
                                                "clusters": [[(0, 7), (2, 10)]]})
        for task in trainer.tasks:
            task.data["train"] = [document]
        screen = self.printed(train.print_start, trainer)
        self.assertIn("ner: not learned: 1 of 3 training spans, which overlap another", screen)
        self.assertIn("coref: not learned: 1 of 2 training spans, which have more than --max-span "
                      "8 words", screen)
        self.assertRegex(screen, r"ner +1 +12 +12  sentences +1 +0.500")
        self.assertIn("ner: not in train: LOC, ORG, PER\n", screen)
        trainer.model = tiny_trainer(("ner", "coref"), sharing="question").model
        self.assertNotIn("ner: not learned", self.printed(train.print_start, trainer))


# ----------------------------------------------------------------------------- the command line

class FolderTest(unittest.TestCase):
    """Tests that run train.py in a folder of their own."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(folder.name)

    def call(self, line, text=None):
        """(exit status, standard output, standard error) of `python train.py LINE`."""
        done = subprocess.run([sys.executable, str(HERE / "train.py"), *shlex.split(line)],
                              input=text, capture_output=True, encoding="utf-8",
                              env=os.environ | {"PYTHONIOENCODING": "latin-1"})    # of no effect
        self.assertNotIn("Traceback", done.stderr)
        return done.returncode, done.stdout, done.stderr

    def output(self, line):
        """Standard output of the same, without the seconds that a new process takes."""
        with contextlib.redirect_stdout(io.StringIO()) as output:
            train.main(shlex.split(line))
        return output.getvalue()

    def refused(self, line, pattern):
        with self.assertRaisesRegex(InputError, pattern, msg=line) as caught:
            self.output(line)
        self.assertNotIn("\n", str(caught.exception))
        gc.collect()                         # the lock of the run, which is held until then


class RunTest(FolderTest):
    """What is done with a run, of two tasks with word vectors, after its training."""
    TRAIN = ("--tasks ner rel --data news --vectors vectors.txt --encoder 1x12 --char-filters 8 "
             "--relation-units 8 --lr 0.02 --dropout 0.1 --batch-size 4 --device cpu")

    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.addClassCleanup(os.chdir, os.getcwd())
        cls.made = Path(folder.name)
        os.chdir(cls.made)
        Path("news").mkdir()
        for i, split in enumerate(("train", "dev", "test")):
            documents = builtin_documents(12, np.random.default_rng(i))
            Path(f"news/{split}.jsonl").write_text("\n".join(map(to_json, documents)))
        rows = np.random.default_rng(0).normal(size=(4, 8)).round(3).tolist()
        words = ["The", "met", "zebra", "in"]                     # the third is only in this file
        Path("vectors.txt").write_text("".join(
            " ".join([word, *map(str, row)]) + "\n" for word, row in zip(words, rows)))
        cls.vectors = dict(zip(words, rows))
        quietly(train.main, shlex.split(f"{cls.TRAIN} --run r --epochs 2"))

    def setUp(self):
        super().setUp()
        shutil.copytree(self.made, ".", dirs_exist_ok=True)

    def untrained(self, folder, *names, **changes):
        """A run of the named tasks, to predict with."""
        settings = replace(TINY, tasks=names, **changes)
        tasks, vocabulary, model = tiny_model(names, settings)
        Path(folder).mkdir()
        trainer = train.MultiTaskTrainer(model, tasks, vocabulary, settings, folder)
        train.write(Path(folder, "best.pt"), train.trained(trainer))

    def test_killed_between_log_and_checkpoint(self):
        log, checkpoint = Path("r/log.jsonl"), train.load("r/checkpoint.pt")
        for kept in (1, 0):
            settings = Settings(**checkpoint["settings"])
            tasks, vocabulary, model = quietly(train.build, settings, checkpoint, Path("r"))
            trainer = train.MultiTaskTrainer(model, tasks, vocabulary, settings, "r")
            history = checkpoint["history"][:kept]
            train.restore_run(trainer, checkpoint | {"history": history})
            train.save_run(trainer)
            self.assertEqual(list(map(json.loads, log.read_text().splitlines())), history)
            train.start_run(trainer)                 # refuses a folder with a log of epochs

    def test_vectors_without_a_word_of_their_own(self):
        lines = Path("vectors.txt").read_text().splitlines(keepends=True)
        Path("vectors.txt").write_text("".join(x for x in lines if "zebra" not in x))
        quietly(train.main, shlex.split(f"{self.TRAIN} --run known --epochs 1"))
        model, vocabulary = train.load_run("known")
        self.assertEqual(len(vocabulary.words), len(vocabulary.counts))
        self.assertEqual(tuple(model.embedder.words.frozen.shape), (0, 8))

    def test_results_hold_labels_and_confusions(self):
        row = json.loads(Path("r/results.json").read_text())["tasks"]["ner"]
        errors, labels, score = row["confusions"], row["labels"], row["own_best"]["test"]
        predicted, gold = (sum(x[side] for x in labels.values()) for side in ("predicted", "gold"))
        hits = {label: round(x["f1-recall"] * x["gold"] / 100) for label, x in labels.items()}
        self.assertGreater(sum(hits.values()), 0)
        self.assertAlmostEqual(score["f1-precision"], 100 * sum(hits.values()) / predicted)
        self.assertAlmostEqual(score["f1-recall"], 100 * sum(hits.values()) / gold)
        for side, total in enumerate(("gold", "predicted")):
            for label, x in labels.items():
                wrong = sum(row[2] for row in errors if row[side] == label)
                self.assertEqual(hits[label] + wrong, x[total])

    def test_evaluate(self):
        results = json.loads(Path("r/results.json").read_text())["tasks"]
        expected = [(name, f"{value:.2f}") for row in results.values()
                    for name, value in row["one_model"]["test"].items()
                    if not name.endswith(("precision", "recall"))]
        self.assertEqual(expected[0][0], "f1")
        for path in ("news", "news/test.jsonl"):
            screen = self.output(f"--run r --evaluate {path}")
            self.assertEqual(re.findall(r"^  (\S+) +(\d+\.\d\d)$", screen, re.M), expected)
        Path("x.jsonl").write_text('{"sentences": [["Ada"]], "clusters": []}')
        status, out, err = self.call("--run r --evaluate x.jsonl")
        self.assertEqual((status, out, err.count("\n")), (2, "", 1))
        self.assertIn("the key of a task of the run", err)

    def test_columns(self):
        documents = cut_documents(read_json("news/test.jsonl"), 1)
        found = [d.annotations["ner"] for d in annotate(*self.model(documents))]
        self.assertTrue(any(map(any, found)))
        columns = self.output("--run r --predict news/test.jsonl --columns")
        without = re.sub(r" \S+$", "", columns, flags=re.M)
        for text, spans in [(columns, found), (without, [d.annotations["ner"] for d in documents])]:
            Path("x.conll").write_text(text)
            read = read_columns("x.conll", "ner")
            self.assertEqual([d.annotations["ner"] for d in read], spans)
            self.assertEqual([d.sentences for d in read], [d.sentences for d in documents])
        self.assertEqual(self.output("--run r --predict x.conll --columns"), columns)
        self.assertFalse({*re.findall(r" ([A-Z])", columns)} - {*"BIO"})
        Path("x.txt").write_text("Ada left.")
        lines = self.output("--run r --predict x.txt --columns").splitlines()
        self.assertEqual([len(line.split()) for line in lines], [2, 2, 2, 0])
        documents[0].annotations.clear()                          # so that not all have a gold tag
        Path("x.jsonl").write_text("\n".join(map(to_json, documents)))
        lines = self.output("--run r --predict x.jsonl --columns").splitlines()
        self.assertEqual({len(line.split()) for line in lines}, {2, 0})
        documents[0].annotations["relations"] = [[]]
        Path("x.jsonl").write_text(to_json(documents[0]))
        self.assertIn("ner: no document of x.jsonl has the key 'ner'",
                      self.output("--run r --evaluate x.jsonl"))
        self.untrained("two", "ner", "emd")
        self.refused("--run two --predict x.txt --columns", "one tagger")
        self.untrained("emd", "emd")                              # columns are its tags too
        self.untrained("question", "rel", "ner", sharing="question")
        Path("x.BIO").write_bytes(Path("x.conll").read_bytes())
        self.assertEqual(self.output("--run r --predict x.BIO --columns"), columns)
        Path("x.bio.gz").write_bytes(gzip.compress(Path("x.conll").read_bytes()))
        self.assertEqual(self.output("--run r --predict x.bio.gz --columns"), columns)
        Path("none.jsonl").write_text("")
        self.refused("--run r --predict none.jsonl", "none.jsonl: expected documents")
        for run in ("emd", "question"):
            lines = self.output(f"--run {run} --predict x.conll --columns").splitlines()
            self.assertEqual({len(line.split()) for line in lines}, {3, 0})

    def test_columns_keep_the_label(self):
        spans = [(0, 1, "EU-L X"), (2, 2, "EU-L X")]               # no cell holds a blank
        document = Document("d", [["a", "b", "c d", "d"]], {"ner": [spans]})
        self.assertEqual(train.column_lines([document, document], "ner"), [
            "a B-EU-L_X B-EU-L_X", "b I-EU-L_X I-EU-L_X", "c_d B-EU-L_X B-EU-L_X", "d O O", ""])

    def model(self, documents):
        model, vocabulary = train.load_run("r")
        return model, documents, vocabulary

    def test_a_kill_between_checkpoint_and_best_weights(self):
        real = train.write
        def killed(path, content):
            if path.name.startswith("best"):
                raise train.Stopped
            real(path, content)
        with mock.patch("train.write", killed), self.assertRaises(train.Stopped):
            self.output(f"{self.TRAIN} --run s --epochs 2")
        self.output("--run s --resume --epochs 1")
        row = json.loads(Path("s/log.jsonl").read_text())
        result = json.loads(Path("s/results.json").read_text())["tasks"]
        for name in ("ner", "rel"):
            self.assertEqual(result[name]["own_best"]["dev"], row["dev"][name])

    def test_words_that_only_the_vector_file_has(self):
        Path("vectors.txt.gz").write_bytes(gzip.compress(Path("vectors.txt").read_bytes()))
        (words, plain), (again, packed) = map(read_vectors, ("vectors.txt", "vectors.txt.gz"))
        self.assertEqual((words, plain.tolist()), (again, packed.tolist()))
        for name, there in [("checkpoint.pt", False), ("best.pt", False), ("vectors.pt", True)]:
            self.assertEqual(b"zebra" in Path("r", name).read_bytes(), there, name)
        self.output(f"{self.TRAIN} --run s --epochs 3")           # without interruption
        for path in Path().glob("vectors.txt*"):
            path.unlink()
        model, documents, vocabulary = self.model([Document("d", [["Zebra", "left"]])])
        batch = make_batch(documents, vocabulary)
        words, outputs = model.encode(batch, ["ner"])
        torch.testing.assert_close(words[0, 0, :8], torch.tensor(self.vectors["zebra"]))
        del vocabulary.word_ids["zebra"]
        words, others = model.encode(make_batch(documents, vocabulary), ["ner"])
        self.assertGreater((outputs["ner"] - others["ner"])[0, 0].abs().max().item(), 1e-3)
        self.output("--run r --resume --epochs 3")
        one, other = (train.load(Path(folder, "checkpoint.pt")) for folder in "rs")
        self.assertEqual([row["loss"] for row in one["history"]],
                         [row["loss"] for row in other["history"]])
        for x, y in zip(one["model"].values(), other["model"].values()):
            self.assertTrue(torch.equal(x, y))

    def test_what_no_run_goes_on_from(self):
        path, line = Path("r/checkpoint.pt"), "--run r --resume --epochs 3"
        state = train.load(path)
        adam = copy.deepcopy(state["optimizer rel"])
        number, moments = next(iter(adam["state"].items()))
        for key, value in [("exp_avg", torch.zeros(3)), ("step", torch.zeros(2)),
                           ("exp_avg_sq", moments["exp_avg_sq"][:1])]:
            adam["state"][number] = moments | {key: value}
            train.write(path, state | {"optimizer rel": adam})
            self.refused(line, "optimizer rel: expected a state of")
        for history in (None, [3], [{}], [{"dev": {"ner": {"f1": 1.0}}}],
                        [{"dev": {"ner": {"f1": "x"}, "rel": {"last-token": 1.0}}}]):
            train.write(path, state | {"history": history})
            self.refused(line, "r: expected a checkpoint of train.py")
        train.write(path, state)
        with zipfile.ZipFile(path) as file:
            members = [(name, file.read(name)) for name in file.namelist()]
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            for name, data in members:
                file.writestr(name, data)
        self.refused(line, "checkpoint.pt: expected a checkpoint.*compressed")
        train.write(path, state)
        for split in ("train", "dev", "test"):
            data = Path(f"news/{split}.jsonl")
            before = data.read_text()
            data.write_text(before.replace('"PER"', '"ORG"', 1))
            self.refused(line, f"the {split} data of ner as in the run")
            data.write_text(before)
        Path("r/lock").unlink()
        Path("r/lock").mkdir()
        self.refused(line, "expected no other process.*unable to open")
        Path("r/lock").rmdir()
        self.refused('--run "" --resume', "--run: expected a folder")
        self.refused('--run "" --data news', "--run: expected a folder")
        state["history"][0]["dev"]["ner"]["f1"] = 100.0           # the third epoch is not the best
        train.write(path, state)
        for name, content in [("best.pt", {"n": 1}), ("best-ner.pt", {"model": {}})]:
            train.write(Path("r", name), content)
            self.refused("--run r --resume", f"{name}: expected weights of this run")
            Path("r", name).write_bytes((self.made / "r" / name).read_bytes())
        Path("r/best-ner.pt").unlink()
        self.refused(line, "r: expected best-ner.pt, found none")

    def test_a_device_without_numbers_is_refused(self):
        for line in ("--run r --predict news/test.jsonl", "--run r --evaluate news",
                     "--run r --resume", "--tasks ner --run s"):
            self.refused(line + " --device meta", "--device meta")

    def test_a_sentence_of_20000_words(self):
        Path("long").write_text("word " * 20_000)
        with contextlib.redirect_stderr(io.StringIO()) as said:
            out = self.output("--run r --predict long")
        self.assertIn("cut", said.getvalue())
        self.assertEqual(said.getvalue().count("\n"), 1)
        self.assertEqual(out.count("word"), 20_000)

    def test_a_reader_that_stops_is_no_error(self):
        Path("text").write_text("Ada Kell of Nordex left Warwick for Zorville last year\n\n" * 1500)
        line = [sys.executable, str(HERE / "train.py"), "--run", "r", "--predict", "text"]
        with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            self.assertIn(b"Kell", process.stdout.readline())
            process.stdout.close()
            self.assertEqual(process.stderr.read(), b"")


class FeaturesTest(FolderTest):
    """Contextual vectors of the user's: three layers, which tell a word's place in its sentence."""
    FILE = """
import math
import numpy as np
def features(sentences):
    return [np.array([[[math.sin(t + (layer + 1) * sum(map(ord, word)) + i) for i in range(4)]
                       for t, word in enumerate(words)] for layer in range(3)])
            for words in sentences]
"""
    TRAIN = "--tasks ner rel --data news --features f.py --encoder 1x12 --batch-size 4 --device cpu"

    def setUp(self):
        super().setUp()
        Path("f.py").write_text(self.FILE)
        Path("news").mkdir()
        for i, split in enumerate(("train", "dev", "test")):
            documents = builtin_documents(8, np.random.default_rng(i))
            Path(f"news/{split}.jsonl").write_text("\n".join(map(to_json, documents)))

    def built(self, *names, **changes):
        settings = replace(TINY, tasks=names, data=("news",), device="cpu", **changes)
        return quietly(train.build, settings, None, None, "f.py")

    def test_mixture(self):
        mixture, states = LayerMixture(3, 4, 0), torch.randn(3, 7, 4).half()
        with torch.no_grad():
            mixture.weights.copy_(torch.tensor([0.0, 99.0, 0.0]))
        torch.testing.assert_close(mixture(states), states[1].float())
        with torch.no_grad():
            mixture.weights.copy_(torch.tensor([1.0, -0.5, 2.0]))
            mixture.gamma.fill_(1.7)
        share = np.exp([1.0, -0.5, 2.0]) / np.exp([1.0, -0.5, 2.0]).sum()
        expected = 1.7 * sum(a * x for a, x in zip(share, states.numpy().astype(float)))
        np.testing.assert_allclose(mixture(states).detach().numpy(), expected, rtol=1e-4, atol=1e-6)

    def test_every_word_gets_its_own_vectors_and_they_are_frozen(self):
        for projected in (0, 5):
            self.check_vectors(*self.built("ner", "rel", contextual_dim=projected))

    def check_vectors(self, tasks, vocabulary, model):
        documents = tasks[0].data["train"][:4]
        batch = make_batch(documents, vocabulary)
        namespace = {}
        exec(self.FILE, namespace)
        embedder = model.eval().embedder
        with torch.no_grad():
            embedder.mixture.weights.copy_(torch.tensor([0.3, -1.0, 0.5]))
        share = embedder.mixture.weights.softmax(0)
        embedded = embedder(batch)
        for b, document in enumerate(documents):
            array, = namespace["features"](document.sentences)
            for t in range(array.shape[1]):
                mixed = sum(w * torch.tensor(x) for w, x in zip(share, array[:, t])).float()
                plain = torch.cat([embedder.words(batch.words), embedder.char_features(batch)], 1)
                expected = torch.cat([plain[batch.tokens[b, t]],
                                      embedder.mixture.project(mixed)])
                torch.testing.assert_close(embedded[b, t], expected, atol=1e-2, rtol=1e-2)
            self.assertFalse(embedded[b, array.shape[1]:].any())
        kept = {words: x.clone() for words, x in vocabulary.contextual.kept.items()}
        trainer = train.MultiTaskTrainer(model, tasks, vocabulary, TINY, "unused")
        before = model.embedder.mixture.weights.clone()
        for task in tasks:
            model.train()
            trainer.train_step(task)
        self.assertFalse(torch.equal(model.embedder.mixture.weights, before))
        self.assertFalse(any(x.requires_grad for x in vocabulary.contextual.kept.values()))
        self.assertTrue(all(torch.equal(x, kept[words]) for words, x in
                            vocabulary.contextual.kept.items()))

    def test_alone_equals_batched(self):
        tasks, vocabulary, model = self.built(*ALL)
        for task in tasks:
            documents = task.data["train"][:1 if task.whole_documents else 4]
            whole = make_batch(documents, vocabulary)
            loss, gradient = loss_and_gradient(model, task.name, whole)
            wide = loss_and_gradient(model, task.name, overpadded(whole))
            alone = [loss_and_gradient(model, task.name, make_batch([d], vocabulary))
                     for d in documents]
            self.assertAlmostEqual(loss, wide[0], places=4)
            self.assertAlmostEqual(loss, np.mean([x for x, _ in alone]), places=4)
            for i, expected in enumerate(gradient):
                mean = torch.stack([g[i] for _, g in alone]).mean(0)
                torch.testing.assert_close(mean, expected, atol=2e-5, rtol=1e-4)

    def test_each_sentence_once_in_groups_of_like_lengths(self):
        Path("f.py").write_text(self.FILE.replace("features", "inner") + """
def features(sentences):
    with open("calls", "a") as file:
        print(*("_".join(words) for words in sentences), file=file)
    return inner(sentences)
""")
        tasks, vocabulary, _ = self.built("ner", "coref")
        groups = [line.split() for line in Path("calls").read_text().splitlines()]
        asked = [sentence for group in groups for sentence in group]
        self.assertEqual(sorted(asked), sorted({"_".join(words) for task in tasks
                         for documents in task.data.values() for d in documents
                         for words in d.sentences}))
        lengths = [sentence.count("_") for sentence in asked]
        self.assertEqual(lengths, sorted(lengths))
        self.assertEqual({len(group) for group in groups[:-1]}, {32})
        size = Path("calls").stat().st_size
        make_batch(tasks[0].data["train"][:4], Vocabulary.from_documents(
            tasks[0].data["train"], contextual=vocabulary.contextual))
        self.assertEqual(Path("calls").stat().st_size, size)            # they were kept
        Path("calls").unlink()                              # questions are none of its sentences
        self.built("ner", "coref", sharing="question")
        self.assertEqual([x.split() for x in Path("calls").read_text().splitlines()], groups)

    def test_a_run_resumes_predicts_and_evaluates_with_its_file(self):
        self.output(f"{self.TRAIN} --run whole --epochs 3")
        out = self.output(f"{self.TRAIN} --run r --epochs 1")
        self.assertRegex(out, r"features: \d+ sentences, 3 layers of width 4, ")
        self.assertRegex(out, r"every encoder reads 0\.\d\d layer 0, .* layer 2, \d\.\d\d gamma")
        self.output("--run r --resume --epochs 3 --features f.py")
        for name in ("best.pt", "best-ner.pt"):
            states = [train.load(f"{run}/{name}")["model"] for run in ("whole", "r")]
            self.assertTrue(all(torch.equal(x, states[1][key]) for key, x in states[0].items()))
        logs = [Path(run, "log.jsonl").read_text() for run in ("whole", "r")]
        self.assertEqual(*logs)
        scores = json.loads(Path("r/results.json").read_text())["tasks"]["ner"]["one_model"]["test"]
        out = self.output("--run r --evaluate news --features f.py")
        self.assertRegex(out, rf"f1 +{scores['f1']:.2f}\n")
        predicted = self.output("--run r --predict news/test.jsonl --features f.py --json")
        model, vocabulary = train.load_run("r", features="f.py")
        documents = read_json("news/test.jsonl")
        expected = [to_json(d) for d in annotate(model, documents, vocabulary)]
        self.assertEqual(predicted.splitlines(), expected)
        self.assertEqual(vocabulary.contextual.kept, {})            # a text may be long

    def test_refusals(self):
        self.output(f"{self.TRAIN} --run r --epochs 1")
        self.output(f"{self.TRAIN.replace('--features f.py', '')} --run without --epochs 1")
        for line in ("--resume", "--predict news/test.jsonl", "--evaluate news"):
            self.refused(f"--run r {line}", "--features: expected a file, as the run.s, of 3 layers of width 4, found none")
            self.refused(f"--run without {line} --features f.py", "--features: expected none, as in")
            self.refused(f"--run r {line} --features no.py", "--features: expected .* found no.py")
        inner = self.FILE.replace("features", "inner") + "def features(sentences):\n "
        for change, pattern in [
                ("return [x[:2] for x in inner(sentences)]", r"\(3, \d+ words, 4\), found .*\(2, "),
                ("return [x[:, :, :3] for x in inner(sentences)]", r"\(3, \d+ words, 4\), found .*, 3\)"),
                ("return [x[:, 1:] for x in inner(sentences)]", r"\(3, \d+ words, 4\), found"),
                ("return [x[0] for x in inner(sentences)]", r"\(3, \d+ words, 4\), found"),
                ("return [x.astype(int) for x in inner(sentences)]", r"floats .* found torch.int"),
                ("return [x * np.nan for x in inner(sentences)]", "finite numbers"),
                ("return [x * 1e6 for x in inner(sentences)]", "finite numbers up to 65504"),
                ("return inner(sentences)[1:]", "expected 32 arrays, found 31"),
                ("return ['no array' for _ in sentences]", "expected a list of arrays"),
                ("return None", "expected a list of arrays: TypeError"),
                ("raise KeyError('a word')", r"features\(\).*: KeyError: 'a word'"),
                ("return open('nowhere')", r"features\(\).*: No such file.*: nowhere$")]:
            Path("g.py").write_text(inner + change + "\n")
            self.refused("--run r --resume --epochs 2 --features g.py", pattern)
        Path("g.py").write_text("import torch\ntorch.set_grad_enabled(False)\n" + self.FILE.replace(
            "def features(sentences):", "def features(sentences):\n    torch.set_grad_enabled(False)"))
        self.output("--run r --resume --epochs 2 --features g.py")     # trains nevertheless
        for text, pattern in [("features = 3", r"a function features\(sentences\)"),
                              ("def other(): pass", r"a function features\(sentences\)"),
                              ("def (", "g.py: expected Python code: SyntaxError"),
                              ("import nowhere", "g.py: expected Python code: ModuleNotFound")]:
            Path("g.py").write_text(text)
            self.refused("--run r --predict news/test.jsonl --features g.py", pattern)
            self.refused("--tasks ner --data news --run new --features g.py", pattern)
        self.assertFalse(Path("new").exists())

    def test_floats_of_any_kind(self):
        _, vocabulary, _ = self.built("ner")
        words, expected = ["a", "b", "c"], torch.randn(3, 3, 4)
        for array in (expected.numpy(), expected.double(), expected.tolist(), expected.half(),
                      expected.clone().requires_grad_(), expected.bfloat16()):
            vocabulary.contextual.function = lambda sentences: [array]
            torch.testing.assert_close(vocabulary.contextual([words]), expected.half(),
                                       atol=0.02, rtol=0.02)


class CommandLineTest(FolderTest):
    SMALL = ("--ner-encoder 1x8 --emd-encoder 1x8 --rel-encoder 1x8 --coref-encoder 1x8 "
             "--coref-units 8 --dropout 0.4 --epochs 1")

    def test_train_resume_predict(self):
        Path("news").mkdir()
        for i, split in enumerate(("train", "dev", "test")):
            documents = builtin_documents(6, np.random.default_rng(i))
            lines = "\n".join(map(to_json, documents))
            Path(f"news/{split}.jsonl").write_text(re.sub('"doc_key": "[^"]*", ', "", lines))
        status, out, err = self.call(f"--tasks ner emd rel coref --data news {self.SMALL}")
        self.assertEqual(status, 0, err)
        for part in ("share of steps", "last-token", "ceaf_e", "\ncoref, dev\n"):
            self.assertIn(part, out)
        run = Path("runs/ner-emd-rel-coref")
        results = json.loads((run / "results.json").read_text())
        self.assertEqual(set(results["tasks"]), set(ALL))
        self.assertIn("mean", results["tasks"]["coref"]["one_model"]["test"])
        self.assertEqual(len((run / "log.jsonl").read_text().splitlines()), 1)
        Path("news").rename("moved")
        self.output(f"--run {run} --resume --epochs 2 --data {Path('moved').resolve()}")
        self.assertEqual(len((run / "log.jsonl").read_text().splitlines()), 2)
        self.refused(f"--run {run} --resume --dropout 0.1", "expected 0.4.* found 0.1")
        self.refused(f"--run {run} --resume --epochs 1", "--epochs: expected at least 2")
        self.refused(f"--run {run}", "--resume")
        with sqlite3.connect(run / "lock", isolation_level=None) as other:    # another process
            other.execute("BEGIN EXCLUSIVE")
            with mock.patch("train.load", side_effect=AssertionError):        # not even read
                self.refused(f"--run {run} --resume", "expected no other process")
            with self.assertRaisesRegex(InputError, "expected no other process"):
                tiny_trainer(folder=run).train(1)
        other.close()
        text = "Ada Kell works for Nordex. She likes the café “Łódź”."
        status, out, err = self.call(f"--run {run} --predict -", text)
        self.assertEqual(status, 0, err)
        words = re.sub(r"\[| [A-Z#0-9 ]*\]", "", out)
        self.assertIn("Ada Kell works for Nordex .", words)
        Path("text").write_text(text)
        self.assertEqual(self.output(f"--run {run} --predict text"), out)
        out = self.output(f"--run {run} --predict text --json")
        Path("train.json").write_text(out)
        document, = read_json("train.json")
        self.assertEqual(len(document.sentences), 2)
        self.assertEqual({*document.annotations}, {"ner", "emd", "relations", "clusters"})
        again = self.output(f"--run {run} --predict train.json --json")
        expected = json.loads(out)                                # sentences instead of text
        self.assertEqual([[text[a:b] for a, b in row] for row in expected.pop("offsets")],
                         document.sentences)
        self.assertEqual(json.loads(again), expected)
        (run / "best.pt").write_bytes(b"no weights")              # these predict
        self.refused(f"--run {run} --predict text", "best.pt: expected a checkpoint")
        settings = Settings(tasks=("ner",))
        tasks, vocabulary, model = train.build(settings)
        trainer = train.MultiTaskTrainer(model, tasks, vocabulary, settings, run)
        with self.assertRaisesRegex(InputError, "a folder without a run"):
            trainer.train(1)

    def test_settings_from_python_are_checked(self):
        for change in (dict(sharing="flt"), dict(tasks=("ner", "foo")), dict(tasks=()),
                       dict(data="folder"), dict(dropout="0.4"), dict(ner_encoder=64),
                       dict(encoder=""), dict(rel_encoder="0x8"),
                       dict(epochs=2.5), dict(seed=None), dict(dropout=1.0), dict(lr=0),
                       dict(unknown=-0.1), dict(clip=math.nan)):
            with self.assertRaisesRegex(InputError, r"--[\w-]+: expected"):
                train.build(Settings(**change))

    def test_what_a_resumed_run_may_change(self):
        stored = {"settings": asdict(replace(TINY, tasks=("ner",)))}
        given = {"epochs": 9, "patience": 3, "device": "cpu", "tasks": ("ner",)}
        self.assertEqual(train.resumed_settings(given, stored, Path("run")),
                         replace(TINY, **given))

    def test_what_goes_on_after_an_interruption(self):
        line = "--tasks ner --encoder 1x8 --run 'a b'"
        with mock.patch("train.MultiTaskTrainer.train", side_effect=KeyboardInterrupt):
            for given, again in [(line, f"{line} --run 'a b' --resume"),
                                 (f"{line} --resume", f"{line} --resume")]:
                with mock.patch("sys.argv", ["train.py", *shlex.split(given)]):
                    with self.assertRaisesRegex(train.Stopped, f"go on with: python train.py {again}$"):
                        self.output(line)

    def test_one_thread_unless_asked_for_more(self):
        def stop(*arguments):
            raise train.Stopped
        self.addCleanup(torch.set_num_threads, 1)
        self.addCleanup(setattr, train, "build", train.build)
        train.build = stop
        for flag, n in (("--threads 2", 2), ("", 1)):
            with self.assertRaises(train.Stopped):
                self.output(f"--run threads {flag}")
            self.assertEqual(torch.get_num_threads(), n)

    def test_runs_are_never_overwritten(self):
        Path("runs/ner").mkdir(parents=True)
        self.assertEqual(train.new_folder(["ner"]), Path("runs/ner-2"))

    def test_bad_commands_are_one_line(self):
        Path("broken.pt").mkdir()
        (Path("broken.pt") / "checkpoint.pt").write_bytes(b"no checkpoint")
        Path("short.txt").write_text("a 1 2\nb 1\n")
        Path("strange.txt").write_text("zzz 1 2\n")
        Path("two").mkdir()
        Path("own").mkdir()
        train.write(Path("own/best.pt"), {"settings": {"tasks": ("pos", "ner")}})
        for name in ("train.json", "train.txt"):
            (Path("two") / name).write_text("")
        for line, part in [("--tasks foo", "invalid choice: 'foo'"), ("--data nowhere", "nowhere"),
                           ("--resume", "--run"), ("--predict x", "--run"), ("--json", "--predict"),
                           ("--run r --predict x --dropout 0", "--device"),
                           ("--run r --predict x --json --columns", "not allowed with"),
                           ("--run r --predict x --threads 0", "--threads: expected a number"),
                           ("--threads -1", "--threads: expected a number"),
                           ("--threads 10000", "--threads: expected a number"),
                           ("--encoder 1x100000", "LAYERSxUNITS"),
                           ("--run own --predict x", "the script that defines its tasks"),
                           ("--run r --resume --predict x", "--resume: expected no --predict"),
                           ("--data two broken.pt", "--data: expected one folder for all tasks"),
                           ("--epochs x", "epochs"), ("--run nothing --resume", "nothing"),
                           ("--nonsense", "--nonsense"),
                           ("--run broken.pt --resume", "checkpoint of train.py"),
                           ("--data two", "found train.json and train.txt"),
                           ("--vectors strange.txt --tasks ner", "words of the training documents"),
                           ("--vectors short.txt --tasks ner", "short.txt, line 2")]:
            self.refused(line, re.escape(part))
        with mock.patch.dict(os.environ, RANK="0"):
            self.refused("--run r --predict x", "expected one process, found torchrun")
        self.assertFalse(Path("runs").exists())
        for message in ("[enforce fail] can't allocate memory: 9 bytes", "CUDA out of memory."):
            with mock.patch("train.main", side_effect=RuntimeError(message)):
                with contextlib.redirect_stderr(io.StringIO()) as err, mock.patch("sys.stdout"):
                    with self.assertRaisesRegex(SystemExit, "2"):
                        train.command_line()
            self.assertIn(message, err.getvalue())
        status, out, err = self.call("--data nowhere")
        self.assertEqual((status, out, err.count("\n")), (2, "", 1))

    def test_checkpoints_run_no_code(self):
        class Evil:
            def __reduce__(self):
                return os.mkdir, ("evil",)
        torch.save({"settings": Evil()}, "checkpoint.pt")
        with self.assertRaises(InputError):
            train.load(Path("checkpoint.pt"))
        self.assertFalse(Path("evil").exists())

    def test_the_fifth_task_of_the_readme(self):
        section = (HERE / "README.md").read_text().split("## Your task")[1]
        Path("pos.py").write_text(re.search(r"```python\n(.*?)```", section, re.S)[1])
        for i, split in enumerate(("train", "dev", "test")):
            documents = builtin_documents(40, np.random.default_rng(i))
            for d in documents:                      # here a word's class is seen from its letters
                starts = itertools.accumulate(map(len, d.sentences), initial=0)
                d.annotations["pos"] = [
                    [(t, t, "WORD" if word.islower() else "NAME" if word.isalpha() else "MARK")
                     for t, word in enumerate(words, start)]
                    for start, words in zip(starts, d.sentences)]
            Path(f"{split}.json").write_text("\n".join(map(to_json, documents)))
        line = [sys.executable, "pos.py", "--tasks", "pos", "ner", "--epochs", "6", "--run", "r",
                "--encoder", "1x16", "--batch-size", "4"]
        environment = os.environ | {"PYTHONPATH": str(HERE)}
        done = subprocess.run([*line, "--data", "."], capture_output=True, env=environment)
        self.assertEqual(done.returncode, 0, done.stderr)
        scores = json.loads(Path("r/results.json").read_text())["tasks"]["pos"]["own_best"]["test"]
        self.assertGreater(scores["f1"], 90.0)
        self.assertAlmostEqual(scores["f1"], scores["f1-recall"])          # it is the accuracy
        done = subprocess.run([*line[:5], "--run", "s"], capture_output=True, env=environment)
        self.assertEqual((done.returncode, done.stderr.count(b"\n")), (2, 1))
        self.assertIn(b"a folder", done.stderr)

    def test_own_code_of_the_readme(self):
        code = (HERE / "README.md").read_text().split("In your own code:")[1].split("```")[1]
        code = code.removeprefix("python").replace("n_epochs=5", "n_epochs=1")
        code = code.replace('("ner", "rel"))', '("ner", "rel"), encoder="1x8")')
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, {})
        self.assertIn("\n{'ner': [[", printed.getvalue())
        self.assertTrue(Path("runs/mine/best.pt").exists())

    def test_every_command_of_the_readme_parses(self):
        text = (HERE / "README.md").read_text()
        lines = re.findall(r"^(?!.*`).*\btrain\.py (.*?)(?:  #.*)?$", text, re.M)
        lines += re.findall(r"`python train\.py ([^`]*)`", text)
        self.assertGreater(len(lines), 4)
        for line in lines:
            if "--help" not in line:
                line = line.split("&&")[0].split("|")[0].replace("--seed S", "--seed 0")
                train.parse(shlex.split(line))


# ------------------------------------------------------------------------------------ benchmark

def benchmark_tasks(rng, n_words=20_000):
    """Tasks of random words in the paper's sizes: newswire sentence lengths, 73 NER and 29 EMD
    tags, 6 relations, coreference documents of 500 tokens; 10 training batches of each."""
    words = ["".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), 2 + rng.poisson(3.8)))
             for _ in range(n_words)]
    often = 1 / np.arange(1, n_words + 1)       # Zipf; as in CoNLL04, 0.57 distinct words a token

    def document(lengths):
        sentences = [rng.choice(words, n, p=often / often.sum()).tolist() for n in lengths]
        n = sum(lengths)
        starts = np.cumsum([0, *lengths])[:-1].tolist()

        def spans(n_labels):
            return [sorted({(s + i, s + i, f"L{rng.integers(n_labels)}")
                            for i in rng.choice(k, max(1, k // 8), replace=False).tolist()})
                    for s, k in zip(starts, lengths)]
        ner = spans(18)
        relations = [[(*a[:2], *b[:2], f"R{rng.integers(6)}") for a, b in zip(s, s[1:])]
                     for s in ner]
        mentions = rng.permutation(n)[:n * 12 // 100].tolist()        # OntoNotes has 12 in 100
        clusters = [[(m, m) for m in mentions[i:i + 4]] for i in range(0, len(mentions), 4)]
        return Document("d", sentences, {"ner": ner, "emd": spans(7), "relations": relations,
                                         "clusters": clusters})
    lengths = np.clip(rng.lognormal(3.1, 0.5, 320).astype(int), 3, 100).tolist()
    sentences = [document([n]) for n in lengths]

    def together(size, lengths):                         # as many sentences as make size tokens
        ends = np.cumsum(lengths)
        n = int((ends < size).sum())
        return [*lengths[:n], size - int(ends[n - 1])]
    documents = [document(together(500, lengths[30 * i:])) for i in range(10)]
    tasks = choose_tasks(ALL)
    for task in tasks:
        task.data = {"train": documents if task.whole_documents else sentences}
    return tasks, [Document("all", [words, words])], document(together(2000, lengths))


def benchmark(rounds=6):
    """Prints what a training step costs, as a multiple of the bare encoders of its task."""
    from statistics import median
    from time import process_time as clock           # CPU time: other programs do not count

    # After some training nearly all gold mentions are among the 0.4 spans a token that are kept.
    # The untrained scorer here keeps few of them, so that they come on top of 0.3.
    settings = Settings(ner_encoder="2x64", emd_encoder="2x64", rel_encoder="3x64",
                        coref_encoder="1x200", dropout=0.4, batch_size=32, lr_patience=8,
                        spans_per_token=0.3)
    tasks, everything, long_document = benchmark_tasks(np.random.default_rng(0))
    vocabulary = Vocabulary.from_documents(everything)
    labels = {task.name: task.labels() for task in tasks}
    torch.manual_seed(0)
    model = HMTL(tasks, labels, vocabulary, settings)
    with tempfile.TemporaryDirectory() as folder:
        trainer = train.MultiTaskTrainer(model, tasks, vocabulary, settings, folder)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, "
          f"{len(vocabulary.words)} words; CPU time, medians of {rounds} x 10 batches")
    print("task   step ms   tokens/s   batch building   step / bare encoders   encoders / nn.LSTM")
    for task in tasks:
        path = [task.name]
        while model.below[path[-1]]:
            path += model.below[path[-1]]
        encoders = [model.encoders[name] for name in path]
        bare = [nn.LSTM(e.forwards[0].input_size, e.width // 2, len(e.forwards),
                        batch_first=True, bidirectional=True) for e in encoders]
        rows = []
        for n in range(10 * rounds):
            documents = task.batch(n, settings.batch_size, 0)
            started = clock()
            batch = make_batch(documents, vocabulary)
            building = clock() - started
            inputs = [torch.randn(*batch.tokens.shape, lstm.input_size, requires_grad=True)
                      for lstm in bare]
            started = clock()
            for lstm, x in zip(bare, inputs):
                lstm(x)[0].sum().backward()
            plain = clock() - started
            model.eval()                                  # no dropout there either
            started = clock()
            for encoder, x in zip(encoders, inputs):
                encoder(x, batch.mask).sum().backward()
            exact = clock() - started
            model.train()
            trainer.steps[task.name] = n
            started = clock()
            trainer.train_step(task)
            step = clock() - started
            if n >= 10:                               # the first round warms up
                rows.append((step, sum(batch.lengths) / step, building / step,
                             (step - building) / plain, exact / plain))
        step, speed, building, ratio, exact = (median(column) for column in zip(*rows))

        def spread(column):                           # of the rounds' medians
            of_rounds = [median(row[column] for row in rows[i:i + 10])
                         for i in range(0, len(rows), 10)]
            return f"({min(of_rounds):.2f}-{max(of_rounds):.2f})"
        print(f"{task.name:5s} {1000 * step:8.1f} {speed:10.0f} {building:15.1%} {ratio:10.2f} "
              f"{spread(3)} {exact:9.2f} {spread(4)}", flush=True)

    import resource

    def of_step(document):
        task.data, task.order = {"train": [document]}, {}
        started = clock()
        trainer.train_step(task)
        return clock() - started
    short, long = (median(x) for x in zip(*((of_step(d), of_step(long_document)) for d in
                                            task.data["train"])))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"coref: 2,000 tokens take {long / short:.1f} times as long as 500, "
          f"peak of this process {peak:.2f} GB")
    try:
        import torchcrf
    except ImportError:
        return print("pip install pytorch-crf==0.7.2 to compare the CRF")
    for n_tags in (73, 9):
        emissions = torch.randn(32, 60, n_tags, requires_grad=True)
        tags, mask = torch.randint(n_tags, (32, 60)), torch.ones(32, 60, dtype=torch.bool)
        ours = CRF(torch.ones(n_tags + 1, n_tags + 1, dtype=torch.bool))
        other, rows = torchcrf.CRF(n_tags, batch_first=True), []
        for _ in range(40):
            times = [clock()]
            (-other(emissions, tags, mask)).backward()
            times.append(clock())
            ours.loss(emissions, tags, mask).sum().backward()
            times.append(clock())
            rows.append(np.diff(times))
        other, ours = np.median(rows, axis=0)
        print(f"CRF, 32 sentences of 60 tokens, {n_tags} tags: pytorch-crf takes "
              f"{other / ours:.1f} times as long")


if __name__ == "__main__":
    if sys.argv[1:] == ["benchmark"]:
        benchmark()
    else:
        unittest.main()
