"""The tests: every claim of the code against a second form that is easy to trust.

    python -m unittest test_hmtl                 # all; or test_hmtl.CRFTest for one class
    python test_hmtl.py benchmark                # what a training step costs
"""

import ast
import contextlib
import copy
import doctest
import io
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import unicodedata
import unittest
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import nn

import hmtl
import tasks
import train
from hmtl import HIERARCHY, HMTL, CorefHead, Encoder, RelationHead, Tagger, annotate
from tasks import (Document, InputError, Scores, Vocabulary, builtin_documents, choose_tasks,
                   cut_documents, make_batch, sentences_of, spans_of, tags_of)
from train import Settings

HERE = Path(__file__).parent
ALL = ("ner", "emd", "rel", "coref")
SIZES = {"ner": "2x6", "emd": "1x5", "rel": "2x6", "coref": "1x7"}
TINY = Settings(word_dim=8, char_dim=4, char_filters=6, dropout=0.0, unknown=0.0, relation_units=9,
                coref_units=10, batch_size=4, epochs=3)

def setUpModule():
    torch.set_num_threads(1)             # in tiny models threads only wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"

def tiny_tasks(names=ALL, n=12):
    """Built-in tasks cut to n training, dev and test documents, most of them with something in."""
    chosen = choose_tasks(names)
    for seed, task in enumerate(chosen):
        for i, split in enumerate(("train", "dev", "test")):
            documents = builtin_documents(n, np.random.default_rng([seed, i]))
            task.data[split] = task.examples(documents)[:n]
    return chosen

def tiny_settings(names=ALL, **changes):
    """Settings of a tiny model, with an encoder of another size for every task."""
    sizes = tuple(f"{name}={SIZES[name]}" for name in names)
    return replace(TINY, **{"tasks": tuple(names), "encoder": sizes, **changes})

def tiny_model(names=ALL, n=12, **changes):
    """(tasks, vocabulary, model), the model always with the same weights."""
    chosen, settings = tiny_tasks(names, n), tiny_settings(names, **changes)
    torch.manual_seed(0)
    vocabulary = Vocabulary.from_documents([d for task in chosen for d in task.data["train"]])
    labels = {task.name: task.labels() for task in chosen}
    model = hmtl.SHARINGS[settings.sharing](chosen, labels, vocabulary, settings)
    return chosen, vocabulary, model

def tiny_trainer(names=ALL, folder="unused", n=12, **changes):
    chosen, vocabulary, model = tiny_model(names, n, **changes)
    settings = tiny_settings(names, **changes)
    return train.new_trainer(model, chosen, vocabulary, settings, folder)

def quietly(call, *arguments):
    with contextlib.redirect_stdout(io.StringIO()):
        return call(*arguments)

def overpadded(batch, tokens=5):
    """The same batch with more padding behind every sentence."""
    return replace(batch, which_word=nn.functional.pad(batch.which_word, (0, tokens)),
                   mask=nn.functional.pad(batch.mask, (0, tokens)))

def loss_and_gradient(model, name, batch):
    model.zero_grad()
    loss = model.train()(name, batch)["loss"]
    loss.backward()
    gradient = [torch.zeros_like(p) if p.grad is None else p.grad.clone()
                for p in model.parameters()]
    return loss.item(), gradient

class EncoderTest(unittest.TestCase):
    """The encoder equals torch's bidirectional LSTM on packed sequences, in any batch."""
    def test_equals_packed_bidirectional_lstm(self):
        torch.manual_seed(0)
        encoder, lengths = Encoder(5, "2x4", rate=0.0), [7, 1, 4]
        plain = nn.LSTM(5, 4, 2, batch_first=True, bidirectional=True)
        for lstms, end in [(encoder.forwards, ""), (encoder.backwards, "_reverse")]:
            for layer, lstm in enumerate(lstms):
                for name, p in lstm.named_parameters():                 # such as weight_ih_l0
                    getattr(plain, f"{name[:-1]}{layer}{end}").data = nn.init.normal_(p).data
        x, mask = torch.randn(3, 7, 5), torch.arange(7) < torch.tensor(lengths)[:, None]
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, True, enforce_sorted=False)
        expected, _ = nn.utils.rnn.pad_packed_sequence(plain(packed)[0], batch_first=True)
        found = encoder(x * mask[:, :, None], mask)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
        self.assertEqual(found[~mask].abs().sum().item(), 0.0)

    def test_a_long_sentence_does_no_harm_to_the_gradient_of_a_short_one(self):
        """The weights let gradients grow, so nothing may run through 295 tokens of padding."""
        torch.manual_seed(0)
        encoder, mask = Encoder(5, "1x8", rate=0.0), torch.arange(300) < torch.tensor([[5], [300]])
        for lstm in [*encoder.forwards, *encoder.backwards]:
            nn.init.orthogonal_(lstm.weight_hh_l0, 8.0)
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
        encoder.register_forward_hook(lambda _, inputs, output: calls.append(inputs[1].shape))
        for lengths, size, shapes in [((3, 9, 1, 4, 8, 2, 9, 1, 1, 30), 8, [(8, 9), (2, 30)]),
                                      ((3, 9, 1, 4, 8), 3, [(3, 4), (2, 9)]),
                                      ((4, 3, 3, 4, 2), 3, [(5, 4)])]:     # 1.25 times its tokens
            documents = [Document("d", [["a"] * n for n in lengths])]
            batch = make_batch(documents, Vocabulary.from_documents(documents))
            x = torch.randn(*batch.mask.shape, 5) * batch.mask[:, :, None]
            found = hmtl.run_in_groups(encoder, x, batch, size)
            torch.testing.assert_close(found, encoder(x, batch.mask))
            self.assertEqual(calls, [*shapes, batch.mask.shape])
            calls.clear()

    def test_only_the_forget_gate_starts_open(self):
        encoder = Encoder(5, "2x4", rate=0.0)
        for lstm in [*encoder.forwards, *encoder.backwards]:     # input, forget, cell, output gate
            self.assertEqual(lstm.bias_ih_l0.tolist(), [0.0] * 4 + [1.0] * 4 + [0.0] * 8)
            self.assertEqual(lstm.bias_hh_l0.tolist(), [0.0] * 16)
            for of_state in lstm.weight_hh_l0.chunk(4):
                torch.testing.assert_close(of_state @ of_state.T, torch.eye(4))

class DropoutTest(unittest.TestCase):
    """Dropout by its definition: counted zeros, and the rest scaled by 1 / (1 - rate)."""
    def test_share_and_scale(self):
        torch.manual_seed(0)
        x = torch.randn(40, 50, 60)
        for rate in (0.5, 0.75, 0.1, 0.0):
            found = hmtl.dropout(x, rate, training=True)
            torch.testing.assert_close(found, torch.where(found == 0, 0.0, x / (1 - rate)))
            for dims in ((0, 1), (0, 2), (1, 2)):                # 2,000 draws or more are counted
                self.assertLess(((found == 0).double().mean(dims) - rate).abs().max().item(), 0.06)
        self.assertTrue(torch.equal(hmtl.dropout(x, 0.5, training=False), x))

    def test_embedder_and_every_layer_have_it_and_padding_stays_zero(self):
        torch.manual_seed(0)
        mask = torch.arange(40) < torch.tensor([[40], [25]])
        encoder, seen = Encoder(5, "2x50", rate=0.5), []
        encoder.forwards[1].register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
        seen.append(encoder(torch.randn(2, 40, 5) * mask[:, :, None], mask))
        _, vocabulary, model = tiny_model(("ner",), dropout=0.5)
        self.assertEqual((model.encoders["ner"].rate, model.embedder.mixture.rate), (0.5, 0.5))
        document = Document("d", [vocabulary.words[2:42], vocabulary.words[42:67]])
        seen.append(model.embedder(make_batch([document], vocabulary))[:, :, :TINY.word_dim])
        for x in seen:
            self.assertAlmostEqual((x[mask] == 0).double().mean().item(), 0.5, delta=0.06)
            self.assertEqual(x[~mask].abs().sum().item(), 0.0)
        self.assertFalse((encoder.eval()(torch.randn(2, 40, 5), mask)[mask] == 0).any())

class GradientTest(unittest.TestCase):
    """Gradients equal central differences in float64, also where the best trigram of a word
    occurs twice, so that the maximum of the char CNN has ties, and where words are repeated."""
    DOCUMENT = Document(
        "d", [["banana", "Mississippi", ".....", "banana"], ["....."], ["ate", "banana"]],
        {"ner": [[(0, 1, "X"), (3, 3, "Y")], [], [(6, 6, "Y")]],
         "emd": [[(1, 3, "X")], [(4, 4, "Y")], [(5, 6, "Y")]],
         "relations": [[(0, 1, 3, 3, "R"), (1, 3, 0, 0, "S")], [], []],
         "clusters": [[(0, 0), (3, 3), (6, 6)], [(1, 2), (4, 4)]]})

    def check(self, model, loss):
        """The slope of loss() along a random direction of every part of the model."""
        model.zero_grad()
        loss().backward()
        self.assertIs(loss().dtype, torch.float64)
        before, parts = copy.deepcopy(model.state_dict()), {}
        for name, p in model.named_parameters():
            part = re.search("encoders|heads|mixture|filters|(word|char)_vectors", name)[0]
            direction = torch.randn_like(p) * (p != 0)      # not of padding, which is not trained
            parts.setdefault(part, []).append((p, direction))
        for part, moves in parts.items():
            slope = sum((p.grad * d).sum().item() for p, d in moves if p.grad is not None)
            losses = []
            for step in (1e-6, -2e-6):
                for p, direction in moves:
                    p.data += step * direction
                losses.append(loss().item())
            model.load_state_dict(before)
            self.assertAlmostEqual((losses[0] - losses[1]) / 2e-6, slope,
                                   delta=1e-7 + 1e-7 * abs(slope), msg=part)

    def test_through_every_head_the_encoders_and_the_embedder(self):
        torch.manual_seed(0)
        contextual = mock.Mock(shape=(2, 4), return_value=torch.randn(2, len(self.DOCUMENT), 4))
        chosen = choose_tasks(ALL)
        for task in chosen:
            task.data["train"] = task.examples([self.DOCUMENT])
        labels = {task.name: task.labels() for task in chosen}
        vocabulary = Vocabulary.from_documents([self.DOCUMENT])
        # All spans are kept: otherwise a small step could change which ones are.
        settings = tiny_settings(contextual_dim=3, max_span=3, spans_per_token=9.0)
        for sharing in ("hierarchical", "latent", "question"):
            model = hmtl.SHARINGS[sharing](chosen, labels, vocabulary, settings, None, contextual)
            for p in model.double().parameters():
                if not p.any():                               # such as most biases
                    nn.init.normal_(p)
            for task in chosen:
                batch = make_batch(task.data["train"], vocabulary)
                with self.subTest(f"{sharing}, {task.name}"):
                    self.check(model, lambda: model(task.name, batch)["loss"])

    def test_equal_maxima_share_the_gradient(self):
        _, vocabulary, model = tiny_model(("ner",), char_filters=64)
        embedder, batch = model.double().embedder, make_batch([self.DOCUMENT], vocabulary)
        weights = torch.rand(len(batch.word_ids), 64, dtype=torch.float64)
        for sign in (1, -1):
            self.check(embedder, lambda: (sign * weights * embedder.char_features(batch)).sum())

class CRFTest(unittest.TestCase):
    """The CRF against the enumeration of all tag sequences, and against logs in float64."""
    LENGTHS = [4, 1, 3, 2]

    def setUp(self):
        torch.manual_seed(1)
        self.draw_crf(["X"])                              # O B-X I-X U-X L-X
        self.mask = torch.arange(4) < torch.tensor(self.LENGTHS)[:, None]
        self.emissions = torch.randn(4, 4, 5, requires_grad=True)

    def draw_crf(self, labels):
        self.tagger = Tagger(choose_tasks(["ner"])[0], labels, 3, 0, TINY)
        self.crf = self.tagger.crf
        for p in self.crf.parameters():
            nn.init.normal_(p, std=2.0)

    def scores(self, b):
        """{tag sequence: score}, for all of sentence b."""
        crf, e, scores = self.crf, self.emissions[b], {}
        for path in itertools.product(range(5), repeat=self.LENGTHS[b]):
            scores[path] = (crf.start[path[0]] + crf.end[path[-1]]
                            + sum(e[t, k] for t, k in enumerate(path))
                            + sum(crf.transitions[i, j] for i, j in zip(path, path[1:]))).item()
        return scores

    def test_loss_and_marginal_probabilities_against_enumeration(self):
        """The gradient of the loss is the probability of every tag, minus 1 for the gold tag."""
        tags = torch.randint(5, (4, 4))
        losses = self.crf.loss(self.emissions, tags, self.mask)
        losses.sum().backward()
        for b, n in enumerate(self.LENGTHS):
            scores, gold = self.scores(b), tuple(tags[b, :n].tolist())
            total = torch.tensor([*scores.values()]).double()
            self.assertAlmostEqual(losses[b].item(), total.logsumexp(0).item() - scores[gold], 4)
            expected = torch.zeros(4, 5)
            for path, weight in zip(scores, total.softmax(0)):
                expected[range(n), path] += weight
            expected[range(n), gold] -= 1
            torch.testing.assert_close(self.emissions.grad[b], expected, atol=1e-5, rtol=1e-4)

    def test_extreme_scores_against_logs_in_float64(self):
        for scale in (0.0, 1.0, 30.0, 1000.0):
            for p in self.crf.parameters():
                nn.init.normal_(p, std=min(5.0, 5.0 * scale))
            emissions = (torch.randn(3, 50, 5) * scale).requires_grad_()
            found = self.crf.log_partition(emissions, torch.ones(3, 50, dtype=torch.bool))
            crf, e = copy.deepcopy(self.crf).double(), emissions.double()
            state = crf.start + e[:, 0]
            for t in range(1, 50):
                state = (state[:, :, None] + crf.transitions).logsumexp(1) + e[:, t]
            expected = (state + crf.end).logsumexp(1)
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-3)
            found.sum().backward()
            self.assertTrue(emissions.grad.isfinite().all())

    def test_viterbi_against_enumeration_of_well_formed_paths(self):
        for _ in range(4):
            self.draw_crf(["X"])
            found = self.crf.decode(self.emissions, self.mask)
            for b, n in enumerate(self.LENGTHS):
                scores = self.scores(b)
                best = max(filter(self.well_formed, scores), key=scores.get)
                self.assertEqual(found[b, :n].tolist(), list(best))

    def well_formed(self, path):
        tags = "".join(self.tagger.tags[k] for k in path)                         # such as B-XL-XO
        return re.fullmatch(r"(O|U-\w|B-X(I-X)*L-X|B-Y(I-Y)*L-Y)*", tags) is not None

    def test_decoded_tags_are_well_formed_and_those_of_the_sentence_alone(self):
        self.draw_crf(["X", "Y"])
        decode = self.crf.decode
        mask = torch.arange(9) < torch.arange(1, 10)[:, None]
        for scale in (0.0, 1.0, 1e4):
            emissions = torch.randn(9, 9, 9) * scale
            for b, tags in enumerate(decode(emissions, mask).tolist()):
                alone = decode(emissions[[b], :b + 1], mask[[b], :b + 1])[0].tolist()
                self.assertEqual(tags[:b + 1], alone)
                self.assertTrue(self.well_formed(alone), alone)

    def test_spans_to_tags_and_back(self):
        spans = [(0, 0, "X"), (2, 4, "Y"), (5, 6, "X")]
        tags = tags_of(spans, 8)
        self.assertEqual(tags, ["U-X", "O", "B-Y", "I-Y", "L-Y", "B-X", "L-X", "O"])
        self.assertEqual(spans_of(tags), spans)
        crossing = [(0, 1, "X"), (0, 4, "Y"), (3, 6, "X"), (6, 6, "Y"),      # the longest is kept
                    (7, 8, "X"), (8, 10, "X"), (10, 11, "X")]
        self.assertEqual(spans_of(tags_of(crossing, 12)), [(0, 4, "Y"), (6, 6, "Y"), (8, 10, "X")])

class RelationTest(unittest.TestCase):
    """Scores of pairs and their loss against the formulas, by hand."""
    def test_loss_is_binary_cross_entropy_over_real_pairs(self):
        (task,), vocabulary, model = tiny_model(("rel",))
        head, batch = model.double().heads["rel"], make_batch(task.data["train"][:3], vocabulary)
        nn.init.normal_(head.label.bias)
        expected, (_, outputs) = 0.0, model.encode(batch, ["rel"])
        for x, n, document in zip(outputs["rel"], batch.lengths, batch.documents):
            gold = {(r[1], r[3], r[4]) for r in document.annotations["relations"][0]}
            for i, j in itertools.product(range(n), repeat=2):
                hidden = head.first.weight @ x[i] + head.first.bias + head.second.weight @ x[j]
                logits = head.label.weight @ hidden.clamp(min=0) + head.label.bias
                for label, p in zip(head.labels, logits.sigmoid().tolist()):
                    expected -= math.log(p if (i, j, label) in gold else 1 - p)
        self.assertAlmostEqual(model("rel", batch)["loss"].item(), expected / 3, places=6)

    def test_a_pair_is_related_above_one_half(self):
        head = RelationHead(choose_tasks(["rel"])[0], ["A", "B", "C"], 4, 0, TINY)
        x = torch.randn(1, 2, 4)
        batch = make_batch([Document("d", [["a", "b"]])], Vocabulary([], [], []))
        self.assertEqual(head.decode(x, None, batch), [[]])        # hardly any pair is, at first
        nn.init.zeros_(head.label.weight)
        head.label.bias.data = torch.tensor([-0.1, 0.1, 0.0])
        pairs = [(0, 0, "B"), (0, 1, "B"), (1, 0, "B"), (1, 1, "B")]
        self.assertEqual(head.decode(x, None, batch), [pairs])

    def test_arguments_are_the_spans_that_end_there(self):
        spans = [(0, 1, "P"), (3, 3, "O")]
        relations = tasks.with_spans([(1, 3, "A"), (3, 2, "A"), (0, 1, "A")], spans)
        self.assertEqual(relations, [(0, 1, 3, 3, "A")])
        self.assertEqual(tasks.with_types(relations, spans), [(0, 1, 3, 3, "A", "P", "O")])

class CorefTest(unittest.TestCase):
    """The loss against the enumeration of all choices of antecedents; spans, their scores and
    features against the formulas of Lee et al. 2017, by hand."""
    SENTENCES = [["a", "b", "c"], ["d", "e"], ["a", "f"]]

    def parts(self, sentences, clusters=(), **changes):
        torch.manual_seed(3)
        document = Document("d", sentences, {"clusters": clusters})
        vocabulary = Vocabulary.from_documents([document])
        settings = tiny_settings(["coref"], **changes)
        model = HMTL(choose_tasks(["coref"]), {"coref": []}, vocabulary, settings)
        head, batch = model.heads["coref"], make_batch([document], vocabulary)
        for scorer in (head.mention_scorer, head.pair_scorer):
            nn.init.normal_(scorer.bias)
        embedded, outputs = model.encode(batch, ["coref"])
        return head, (outputs["coref"], embedded, batch)

    def kept(self, head, inputs, gold=None):
        first, last, scores, g = head.keep_spans(*inputs, gold)
        return list(zip(first.tolist(), last.tolist())), scores, g

    def score(self, scorer, *inputs):
        """FFNN([a; b; ...]), in the obvious form."""
        weight = torch.cat([part.weight for part in scorer.parts], 1)
        hidden = (weight @ torch.cat(inputs) + scorer.bias).relu()
        return scorer.score(scorer.hidden(hidden).relu())[0]

    def check(self, sentences, clusters, **changes):
        """The loss is -log of the summed probability of all ways to choose correct antecedents."""
        head, inputs = self.parts(sentences, clusters, **changes)
        gold = hmtl.gold_clusters(inputs[2], clusters, head.settings.max_span)
        spans, scores, g = self.kept(head, inputs, gold)
        cluster_of = {mention: cluster for cluster in clusters for mention in cluster}
        choices, correct = [], []                           # per span: {antecedent: score}, [...]
        for i, span in enumerate(spans):
            choices.append({None: 0.0})
            for j in range(max(0, i - head.settings.antecedents), i):
                product = head.project(g[i]) * head.project(g[j])
                distance = head.distance_vectors.weight[[0, 0, 1, 2, 3, 4, 4, 4, 5][min(i - j, 8)]]
                pair = self.score(head.pair_scorer, g[i], g[j], product, distance)
                choices[i][j] = (pair + scores[i] + scores[j]).item()
            correct.append([j for j in choices[i] if j is not None
                            and spans[j] in cluster_of.get(span, [])] or [None])
        right = total = 0.0
        for choice in itertools.product(*choices):
            weight = math.exp(sum(row[j] for row, j in zip(choices, choice)))
            total += weight
            right += weight * all(j in row for j, row in zip(choice, correct))
        loss = head.loss(*inputs)
        self.assertAlmostEqual(loss.item(), -math.log(right / total), places=4)
        loss.backward()
        return spans

    def test_loss_against_enumeration(self):
        clusters = [[(0, 0), (3, 3), (5, 5)], [(1, 1), (4, 4)]]
        self.check(self.SENTENCES, clusters, max_span=1, spans_per_token=1.0)
        self.check(self.SENTENCES, clusters, max_span=1, spans_per_token=1.0, antecedents=2)
        spans = self.check(self.SENTENCES, [[(0, 0), (3, 4)], [(1, 2), (4, 4)]], max_span=2)
        self.assertIn(len(spans), range(4, 7))
        self.check(self.SENTENCES, [])
        self.assertEqual(self.check([["a"]], []), [(0, 0)])           # the loss is 0, not NaN
        self.check(self.SENTENCES, [[(0, 2), (3, 4)]], max_span=1)    # all too long to be kept

    def test_training_keeps_gold_mentions_beside_the_best(self):
        clusters = [[(0, 2), (3, 4)], [(1, 1), (6, 6)], [(2, 3), (5, 5)]]        # (2, 3) is no span
        mentions = {(0, 2), (3, 4), (1, 1), (6, 6), (5, 5)}
        head, inputs = self.parts(self.SENTENCES, clusters, spans_per_token=9.0)      # all of them
        spans, scores, _ = self.kept(head, inputs)
        head.settings.spans_per_token = 0.5
        best = [spans[i] for i in scores.argsort()[-3:].sort().values]
        self.assertEqual(self.kept(head, inputs)[0], best)
        self.assertFalse(mentions <= {*best})
        gold = hmtl.gold_clusters(inputs[2], clusters, TINY.max_span)
        self.assertEqual(self.kept(head, inputs, gold)[0], sorted({*best} | mentions))

    def test_spans_lie_within_a_sentence_in_order(self):
        head, inputs = self.parts(self.SENTENCES, max_span=3, spans_per_token=2.0)
        spans, scores, g = self.kept(head, inputs)
        self.assertEqual(spans, [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2), (3, 3), (3, 4),
                                 (4, 4), (5, 5), (5, 6), (6, 6)])   # all there are; 14 were wanted
        x, embedded = (part[inputs[2].mask] for part in inputs[:2])
        for (start, end), score, found in zip(spans, scores, g):
            weights = head.attention(x[start:end + 1])[:, 0].softmax(0)
            by_hand = [x[start], x[end], weights @ embedded[start:end + 1],
                       head.length_vectors.weight[end - start]]
            torch.testing.assert_close(found, torch.cat(by_hand))
            torch.testing.assert_close(score, self.score(head.mention_scorer, *by_hand))

    def test_gold_clusters_by_start_and_width(self):
        _, (_, _, batch) = self.parts(self.SENTENCES)
        expected = torch.zeros(7, 2, dtype=torch.long)             # (0, 2) has three words
        expected[3, 1], expected[2, 0], expected[5, 1] = 1, 2, 2
        found = hmtl.gold_clusters(batch, [[(0, 2), (3, 4)], [(2, 2), (5, 6)]], 2)
        self.assertTrue(torch.equal(found, expected))

    def test_distance_features(self):
        """1, 2, 3, 4, 5-7, 8-15, 16-31, 32-63, 64+, as in Clark & Manning 2016."""
        head, _ = self.parts([["a"]])
        head.pair_scorer.forward = lambda summed: summed[:, 0]
        nn.init.zeros_(head.project.bias)
        nn.init.constant_(head.pair_scorer.parts[3].weight, 1 / 20)
        head.distance_vectors.weight.data = torch.arange(9.0)[:, None].expand(9, 20)
        scores = head.antecedent_scores(torch.zeros(90), torch.zeros(90, head.project.in_features))
        expected = [0, *(d - 1 if d < 5 else 2 + int(math.log2(d)) for d in range(1, 71))]
        torch.testing.assert_close(scores[89], torch.tensor(expected).float())
        self.assertEqual(scores[1].tolist(), [0.0, 0.0, *[-math.inf] * 69])

    def test_span_representations_are_dropped(self):
        head, inputs = self.parts(self.SENTENCES, spans_per_token=2.0, dropout=0.5)
        width_feature = self.kept(head, inputs)[2][:, -20:]
        self.assertAlmostEqual((width_feature == 0).double().mean().item(), 0.5, delta=0.1)

    def test_clusters_follow_the_antecedents(self):
        head, inputs = self.parts([["a", "b", "c", "d", "e"]], max_span=1, spans_per_token=1.0)
        head.antecedent_scores = lambda *_: torch.eye(5)[[0, 0, 2, 0, 3]]   # steps back, 0: none
        self.assertEqual(head.decode(*inputs), [[[(0, 0), (2, 2)], [(1, 1), (4, 4)]]])
        self.assertEqual(hmtl.clusters_of("abcdefg", [0, 1, 0, 2, 1, 0, 4]), [[*"abde"], [*"cg"]])

class WordTest(unittest.TestCase):
    """Words as the model reads them, against a convolution word by word and rows of the tables."""
    def test_character_features_equal_a_convolution_word_by_word(self):
        _, vocabulary, model = tiny_model(("ner",))
        words, embedder = ["a", "Kellstadburg", "it", "Zor", "Ad"], model.embedder
        batch = make_batch([Document("d", [words])], vocabulary)
        found = embedder(batch)[0, :, -TINY.char_filters:]
        weight = embedder.filters.weight.view(-1, 3, TINY.char_dim).transpose(1, 2)
        for word, features in zip(words, found):
            ids = torch.tensor([vocabulary.char_ids.get(c, 1) for c in word])
            expected = nn.functional.conv1d(embedder.char_vectors(ids).T[None], weight,
                                            embedder.filters.bias, padding=1).relu().amax(2)[0]
            torch.testing.assert_close(features, expected)
        self.assertEqual(embedder.char_vectors.weight[:2].tolist(), [[0.0] * TINY.char_dim] * 2)

    def test_rare_words_become_unknown_in_training_only(self):
        documents = [Document("d", [["often", "once", "Once"]]), Document("e", [["Often"]])]
        vocabulary = Vocabulary.from_documents(documents + documents, ["often", "vector"])
        self.assertEqual(vocabulary.words, ["", "<unknown>", "often", "once", "vector"])
        vectors = ["often", "vector"], torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        batch = make_batch([Document("d", [["Often", "once", "new", "vector"]])], vocabulary)
        for rare, unknown, ids in [(1, 1.0, [2, 1, 1, 4]), (2, 1.0, [1, 1, 1, 4]),
                                   (2, 0.0, [2, 3, 1, 4])]:
            settings = replace(TINY, rare=rare, unknown=unknown, word_dim=2)
            embedder = hmtl.Embedder(vocabulary, settings, vectors)
            table = [*embedder.word_vectors.trained.weight.tolist(), [3.0, 4.0]]  # "vector": id 4
            self.assertEqual((len(table), table[2]), (5, [1.0, 2.0]))
            for training, read in ((True, ids), (False, [2, 3, 1, 4])):
                seen = embedder.train(training)(batch)[0, :, :2]
                self.assertEqual(seen.tolist(), [table[i] for i in read])

    def test_words_that_look_the_same_are_the_same(self):
        forms = ["Jos\u00e9", "Jose\u0301", "Jo\u00ads\u00e9", "Jo\u200bse\u0301"]
        for trained, form in itertools.product(forms, forms):
            vocabulary = Vocabulary.from_documents([Document("d", [[trained]])])
            self.assertEqual((vocabulary.words[2:], vocabulary.chars[2:]),
                             (["jos\u00e9"], ["J", "o", "s", "\u00e9"]))
            batch = make_batch([Document("e", [[form]])], vocabulary)
            self.assertEqual((batch.word_ids.tolist(), batch.chars.tolist()),
                             ([0, 2], [0, 0, 2, 3, 4, 5, 0]))
        batch = make_batch([Document("e", [["\u200b", "Jose"]])], vocabulary)
        self.assertEqual(batch.word_ids.tolist(), [0, 1, 1])       # a word is never padding

    def test_no_more_than_40_characters_are_read(self):
        document = Document("d", [["J" * 99]])
        batch = make_batch([document], Vocabulary.from_documents([document]))
        self.assertEqual(batch.chars.tolist(), [0, 0, *[2] * 40, 0])

    def test_a_sentence_that_is_a_string_is_refused(self):
        for sentences in (["Ada works."], "Ada works."):
            with self.assertRaisesRegex(TypeError, r"^a sentence is a list.*tasks\.parse_text"):
                Document("k", sentences)

    def test_examples_in_docstrings(self):
        found = doctest.testmod(tasks)
        self.assertEqual((found.failed, found.attempted), (0, 2))

class ModelTest(unittest.TestCase):
    """The whole model: alone equals batched, and scores against predictions made by hand."""
    def test_alone_equals_batched_equals_overpadded(self):
        for sharing in ("hierarchical", "question"):
            chosen, vocabulary, model = tiny_model(sharing=sharing)
            for task in chosen:
                documents = task.data["train"][:1 if task.whole_documents else 4]
                whole = make_batch(documents, vocabulary)
                batches = [make_batch([document], vocabulary) for document in documents]
                loss, gradient = loss_and_gradient(model, task.name, whole)
                alone = [loss_and_gradient(model, task.name, batch) for batch in batches]
                wide = loss_and_gradient(model, task.name, overpadded(whole))
                means = [torch.stack(parts).mean(0) for parts in zip(*[g for _, g in alone])]
                predictions = model.eval().predict(whole)[task.name]
                with self.subTest(sharing, task=task.name):
                    for x, found in [(np.mean([x for x, _ in alone]), means), wide]:
                        self.assertAlmostEqual(x, loss, places=4)
                        torch.testing.assert_close(found, gradient, atol=2e-5, rtol=1e-4)
                    self.assertEqual(model.predict(overpadded(whole))[task.name], predictions)
                    self.assertEqual([rows for batch in batches
                                      for rows in model.predict(batch)[task.name]], predictions)

    def test_metrics_are_kept_by_the_model(self):
        chosen, vocabulary, model = tiny_model()
        gold = [replace(d, annotations={**d.annotations, "ner": [[]]})
                for d in chosen[2].data["dev"][:6]]
        batch, heads = make_batch(gold, vocabulary), model.eval().heads
        heads["ner"].decode = lambda *_: [[]] * len(gold)          # the arguments are in emd
        heads["emd"].decode = lambda *_: [d.annotations["emd"][0] for d in gold]
        heads["rel"].decode = lambda *_: [
            [(r[1], r[3], r[4]) for r in d.annotations["relations"][0]] for d in gold]
        self.assertEqual(model.predict(batch, ["rel"]).keys(), {"rel", "emd"})
        model("rel", batch)
        scores = model.get_metrics("rel", reset=True)
        self.assertEqual([scores[k] for k in ("last-token", "boundaries", "strict")], [100.0] * 3)
        self.assertEqual(model.get_metrics("rel"), {})
        for counts in heads["rel"].count(model.predict(batch), batch):       # now with ner
            model.metrics["rel"].add(counts)
        self.assertEqual(model.get_metrics("rel", reset=True), scores)
        heads["emd"].decode = lambda *_: [
            [(s, e, "NEW") for s, e, _ in d.annotations["emd"][0]] for d in gold]
        model("rel", batch)
        scores = model.get_metrics("rel")
        self.assertEqual([scores[k] for k in ("last-token", "boundaries", "strict")], [100, 100, 0])

class SharingTest(unittest.TestCase):
    """Which encoders a head reads, for all subsets of the tasks, against lists made by hand."""
    def test_every_sharing_trains_scores_and_annotates_all_subsets(self):
        document = Document("d", [["Ada", "Kell"], [], ["left", "."]])
        subsets = [s for size in range(1, 5) for s in itertools.combinations(ALL, size)]
        for sharing, names in itertools.product(hmtl.SHARINGS, subsets):
            chosen, vocabulary, model = tiny_model(names, n=2, sharing=sharing)
            self.assertEqual(set(model.encoders), set(names))
            for task in chosen:
                batch = make_batch(task.data["train"][:1], vocabulary)
                self.assertTrue(model.train()(task.name, batch)["loss"].isfinite())
                batch = make_batch(task.data["dev"][:1], vocabulary)
                self.assertEqual(len(model.eval()(task.name, batch)["predictions"]), 1)
                self.assertIn(task.validation_metric_name, model.get_metrics(task.name))
            found = annotate(model, document, vocabulary)
            self.assertEqual({*found.annotations}, {task.annotation for task in chosen})
            self.assertEqual(json.loads(tasks.to_json(found))["sentences"], document.sentences)

    def test_hierarchy_from_the_table_and_sizes_from_the_settings(self):
        self.assertEqual(HIERARCHY["rel"], HIERARCHY["coref"])
        self.assertEqual([tiny_model(names, n=2)[2].below["rel"] for names in
                          (ALL, ("ner", "rel"), ("rel", "coref"))], [["emd"], ["ner"], []])
        encoders = tiny_model(encoder=("3x4", "emd=1x5"), n=2)[2].encoders.values()
        self.assertEqual([(len(e.forwards), len(e.backwards), e.width) for e in encoders],
                         [(3, 3, 8), (1, 1, 10), (3, 3, 8), (3, 3, 8)])

    def test_gradient_reach(self):
        expected = {"hierarchical": [{"ner"}, {"ner", "emd"}, {"ner", "emd", "rel"},
                                     {"ner", "emd", "coref"}],
                    "inverted": [set(ALL), {"emd", "rel", "coref"}, {"rel"}, {"coref"}]}
        for sharing in hmtl.SHARINGS:                  # in the others a task reaches all encoders
            chosen, vocabulary, model = tiny_model(sharing=sharing)
            for task, encoders in zip(chosen, expected.get(sharing, [set(ALL)] * 4)):
                documents = task.data["train"][:2 - task.whole_documents]
                loss_and_gradient(model, task.name, make_batch(documents, vocabulary))
                reached = {key for key, part in [*model.encoders.items(), ("words", model.embedder)]
                           if any(p.grad is not None and p.grad.abs().sum() > 0
                                  for p in part.parameters())}
                self.assertEqual(reached, {"words", *encoders}, sharing)

    def test_latent_mixture_is_a_softmax_of_weights(self):
        chosen, vocabulary, model = tiny_model(sharing="latent")
        batch = make_batch(chosen[0].data["train"][:2], vocabulary)
        direct = tiny_model()[2]                                   # the same, without mixtures
        direct.encoders, direct.embedder = model.encoders, model.embedder
        model.mixtures["rel"].data = torch.tensor([1.0, 2.0, 3.0, 4.0]).log()
        mixed = model.encode(batch, ["rel"])[1]["rel"]
        expected = 0                                               # the shares are 0.1 to 0.4
        for i, name in enumerate(ALL, 1):
            plain = direct.encode(batch, [name])[1][name]
            expected += i / 10 * nn.functional.pad(plain, (0, mixed.shape[2] - plain.shape[2]))
        torch.testing.assert_close(mixed, expected)

class QuestionTest(unittest.TestCase):
    """Labels as questions, against single pairs of tokens with one question at a time."""
    def probabilities(self, model, vocabulary, head, x):
        """{(i, j, label): probability} of the tokens x of a sentence."""
        found = {}
        for label, words in zip(head.labels, head.label.batch.sentences[1:]):
            question = model.embedder(make_batch([Document("q", [words])], vocabulary))[0]
            row = head.label.reader(question.mean(0))
            for i, j in np.ndindex(len(x), len(x)):
                hidden = torch.relu(head.first(x[i]) + head.second(x[j]))
                found[i, j, label] = torch.sigmoid(row[:-1] @ hidden + row[-1]).item()
        return found

    def spans_among(self, probabilities):
        """The spans above 1/2. Of those that overlap, the most probable is kept."""
        kept = []
        for (i, j, label), p in sorted(probabilities.items(), key=lambda item: -item[1]):
            if p > 0.5 and i <= j and all(j < a or b < i for a, b, _ in kept):
                kept.append((i, j, label))
        return sorted(kept)

    def test_questions_against_single_pairs(self):
        _, vocabulary, model = tiny_model(sharing="question")
        heads = model.eval().heads
        self.assertEqual(heads["ner"].label.batch.sentences,
                         [["ner"], ["ner", "LOC"], ["ner", "ORG"], ["ner", "PER"]])
        self.assertIn(["rel", "Works", "For"], heads["rel"].label.batch.sentences)
        self.assertEqual(len({id(heads[name].first) for name in ("ner", "emd", "rel")}), 1)
        self.assertIs(type(heads["coref"]), CorefHead)             # has no questions
        with torch.no_grad():                                      # every question gets answers
            reader = heads["ner"].label.reader
            for layer in (reader, heads["ner"].first, heads["ner"].second):
                layer.weight *= 5
            reader.bias[-1] = 4.5
        for name, untrained in (("ner", []), ("rel", []), ("rel", ["Kill"])):
            head = heads[name]
            if untrained:                                          # its words are its weights
                head.labels = untrained + head.labels
                head.label_ids = {label: i for i, label in enumerate(head.labels)}
                head.label = hmtl.Questions(name, head.labels, vocabulary, model.embedder, reader)
            batch = make_batch(model.tasks[name].data["train"][:3], vocabulary)
            embedded, inputs = model.encode(batch, [name])
            loss, found = 0.0, []
            for x, n, gold in zip(inputs[name], batch.lengths, head.gold(batch)):
                gold = {(r[1], r[3], r[4]) if name == "rel" else r for r in gold}
                p = self.probabilities(model, vocabulary, head, x[:n])
                loss -= sum(math.log(p[key] if key in gold else 1 - p[key]) for key in p)
                found.append(self.spans_among(p) if name == "ner" else
                             sorted(key for key in p if p[key] > 0.5))
            self.assertAlmostEqual(head.loss(inputs[name], embedded, batch).item(), loss / 3,
                                   delta=loss / 1e3)
            self.assertEqual([*map(sorted, head.decode(inputs[name], embedded, batch))], found)
            self.assertIn(head.labels[0], {label for rows in found for *_, label in rows})

    def test_spans_are_above_one_half_and_the_most_probable_of_those_that_overlap(self):
        head = tiny_model(sharing="question")[2].heads["ner"]
        generator = torch.Generator().manual_seed(0)
        for _ in range(30):
            logits = torch.randn(5, 5, 3, generator=generator) - 0.5
            expected = self.spans_among({(i, j, head.labels[k]): logits[i, j, k].sigmoid().item()
                                         for i, j, k in np.ndindex(5, 5, 3)})
            head.logits = lambda *_: [logits]
            self.assertEqual(head.decode(None, None, None), [expected])

    def test_labels_of_any_script_are_questions(self):
        _, vocabulary, model = tiny_model()
        labels = ["\u4eba", "\u7ec4\u7ec7_2", "OrgBased_In", "USED-FOR", "\u00a7"]
        label = hmtl.Questions("rel", labels, vocabulary, model.embedder, None)
        self.assertEqual([words[1:] for words in label.batch.sentences[1:]], [
            ["\u4eba"], ["\u7ec4\u7ec7", "2"], ["Org", "Based", "In"], ["USED", "FOR"], ["\u00a7"]])

    def test_questions_start_improbable_in_one_stack_and_read_frozen_words(self):
        question, flat = (tiny_model(n=2, sharing=name)[2] for name in ("question", "flat"))
        self.assertEqual(question.below, flat.below)
        self.assertEqual(question.heads["rel"].label.reader.bias[-1].item(), -7.0)
        vocabulary = Vocabulary.from_documents([Document("d", [["ner", "loc"]])], ["per"])
        settings = tiny_settings(("ner",), sharing="question", unknown=1.0, dropout=0.5)
        model = hmtl.QuestionHMTL(choose_tasks(["ner"]), {"ner": ["LOC", "PER"]}, vocabulary,
                                  settings, (["per"], torch.ones(1, TINY.word_dim)))
        head, hidden = model.heads["ner"], torch.ones(TINY.relation_units)
        before = head.label(hidden)                         # in training, too, no dropout
        torch.testing.assert_close(model.eval().heads["ner"].label(hidden), before)
        model.embedder.word_vectors.frozen += 1
        self.assertEqual((head.label(hidden) != before).tolist(), [False, True])

class PredictionTest(unittest.TestCase):
    """Annotated documents, against predictions of single sentences and rows made by hand."""
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
        annotate(model, document, vocabulary)
        self.assertEqual(calls, [(name, False) for name in ALL])

    def test_annotations_have_document_offsets_and_arguments_from_the_nearest_tagger(self):
        document = Document("d", [["x", "Ada"], [], ["Bo", "Kell", "left"]], {"ner": "gold"},
                            offsets="kept")
        decoded = {"ner": [[(1, 1, "PER")], [(1, 1, "PER"), (2, 2, "ORG")]],
                   "emd": [[(0, 0, "PER"), (1, 1, "ORG")], [(0, 1, "PER"), (2, 2, "ORG")]],
                   "rel": [[(1, 0, "A")], [(1, 2, "A"), (1, 5, "A")]]}
        moved = {"ner": [[(1, 1, "PER")], [], [(3, 3, "PER"), (4, 4, "ORG")]],
                 "emd": [[(0, 0, "PER"), (1, 1, "ORG")], [], [(2, 3, "PER"), (4, 4, "ORG")]]}
        for names, relations in [(ALL[:3], [[(1, 1, 0, 0, "A")], [], [(2, 3, 4, 4, "A")]]),
                                 (("ner", "rel"), [[], [], [(3, 3, 4, 4, "A")]]),
                                 (("rel",), [[(1, 1, 0, 0, "A")], [], [(3, 3, 4, 4, "A")]])]:
            _, vocabulary, model = tiny_model(names)
            for name, head in model.heads.items():
                head.decode = lambda *_, rows=decoded[name]: rows
            expected = {name: moved[name] for name in names[:-1]} | {"relations": relations}
            self.assertEqual(annotate(model, document, vocabulary),
                             replace(document, annotations=expected))
        self.assertEqual(document.annotations, {"ner": "gold"})

    def test_annotations_equal_predictions_of_single_sentences_in_training_too(self):
        whole = builtin_documents(3, np.random.default_rng(6))
        first, second, *others = whole[0].sentences
        documents = [Document("gaps", [[], first, [], second, *others, []]), Document("none", []),
                     Document("empty", [[], []]), *whole]
        for names in (ALL, ALL[:3]):                 # documents at once, sentence by sentence
            _, vocabulary, model = tiny_model(names, dropout=0.9)
            nn.init.zeros_(model.heads["rel"].label.bias)          # so that there are relations
            if "coref" in names:                                   # and clusters
                nn.init.constant_(model.heads["coref"].pair_scorer.score.bias, 0.6)
            for document in documents:
                start, expected = 0, {task.annotation: [] for task in model.eval().tasks.values()}
                for words in document.sentences:
                    one = {"ner": [[]], "emd": [[]], "rel": [[]]}
                    if words:
                        one = model.predict(make_batch([Document("s", [words])], vocabulary))
                    one["relations"] = [tasks.with_spans(one["rel"][0], one["emd"][0])]
                    for key in ("ner", "emd", "relations"):
                        expected[key].append(tasks.shifted(one[key][0], start))
                    start += len(words)
                if "coref" in names and len(document):
                    batch = make_batch([document], vocabulary)
                    expected["clusters"] = model.predict(batch)["coref"][0]
                for size, training in ((1, True), (3, False), (32, True)):
                    found = annotate(model.train(training), document, vocabulary, size)
                    self.assertEqual(found.annotations, expected)
                    self.assertEqual({part.training for part in model.modules()}, {training})
            self.assertTrue(all(map(any, expected.values())))

class ScoreTest(unittest.TestCase):
    """Scores against worked examples of the literature, enumeration and counts made by hand."""
    def f1(self, count, predicted, gold):
        scores = Scores()
        scores.add({"x": count(predicted, gold)})
        found = scores.compute()
        return [round(found[k] / 100, 3) for k in ("x-precision", "x-recall", "x")]

    def test_worked_examples(self):
        muc, b_cubed, ceaf_e = tasks.muc, tasks.b_cubed, tasks.ceaf_e
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
        # The best matching, abc with c and d with abd, leaves out the most similar pair.
        self.assertEqual(self.f1(ceaf_e, ["abc", "d"], ["abd", "c"]), [0.5, 0.5, 0.5])
        # Singletons are ordinary clusters; nothing found is nothing right, and 0 / 0 is 0.
        self.assertEqual(self.f1(b_cubed, ["a", "b"], ["ab"]), [1.0, 0.5, 0.667])
        self.assertEqual(self.f1(muc, ["a", "b"], ["ab"]), [0.0, 0.0, 0.0])
        for count, gold in itertools.product(tasks.COREF_SCORES.values(), (["ab"], [])):
            self.assertEqual(self.f1(count, [], gold), [0.0, 0.0, 0.0])

    def test_assignment_against_sums_for_every_set_of_columns(self):
        rng = np.random.default_rng(1)
        for _ in range(200):                 # up to 8 x 8, for paths of several swaps
            value = rng.random(rng.integers(0, 9, 2)) * (rng.random() < 0.8)
            value *= rng.random(value.shape) < 0.7
            best = {0: 0.0}                  # columns taken so far, as bits: the best sum
            for row in value:
                for taken, total in list(best.items()):
                    for j, x in enumerate(row):
                        if not taken >> j & 1:
                            columns = taken | 1 << j
                            best[columns] = max(best.get(columns, 0.0), total + x)
            self.assertAlmostEqual(tasks.best_matching_sum(value), max(best.values()), places=9)

    def test_documents_add_up_before_the_division(self):
        scores, count_rows = Scores(), tasks.count_rows
        scores.add({"x": count_rows([(0, 1, "A")], [(0, 1, "A"), (3, 3, "B")])})
        scores.add({"x": count_rows([(0, 1, "A"), (2, 2, "B"), (4, 4, "B")], [(0, 1, "B")])})
        found = scores.compute()
        self.assertAlmostEqual(found["x-precision"], 100 / 4)
        self.assertAlmostEqual(found["x-recall"], 100 / 3)
        self.assertAlmostEqual(found["x"], 200 / 7)
        coref = Scores("mean")
        coref.add({name: count(["ab", "cd", "fghi"], ["abc", "defg"])
                   for name, count in tasks.COREF_SCORES.items()})
        self.assertAlmostEqual(coref.compute()["mean"], 100 * (0.4 + 5 / 11 + 0.52) / 3)

    def test_scores_of_labels_add_up_to_the_score_of_all(self):
        gold = [(0, 1, "A"), (0, 1, "B"), (3, 3, "A"), (4, 4, "A"), (9, 9, "D")]
        found = [(0, 1, "C"), (0, 1, "B"), (4, 4, "A"), (5, 6, "B"), (5, 6, "A")]
        self.assertEqual(tasks.count_labels("f1", found, gold), {
            "f1": (2, 5, 2, 5), "f1 A": (1, 2, 1, 3), "f1 B": (1, 2, 1, 1),
            "f1 C": (0, 1, 0, 0), "f1 D": (0, 0, 0, 1)})     # C only predicted, D only in gold
        self.assertEqual(tasks.count_labels("f1", [], []), {"f1": (0, 0, 0, 0)})
        rng = np.random.default_rng(0)
        for _ in range(50):
            gold, found = ([(*sorted(row[:2]), "ABC"[row[2]]) for row in rng.integers(
                3, size=(1 + rng.integers(8), 3)).tolist()] for _ in range(2))
            total, *of_labels = tasks.count_labels("f1", found, gold).values()
            self.assertEqual(tuple(map(sum, zip(*of_labels))), total)
            self.assertEqual(total, tasks.count_rows(found, gold))

    def test_spans_as_conlleval_reads_them(self):
        for tags, spans in [("B-X I-X O B-X", [(0, 1, "X"), (3, 3, "X")]),
                            ("I-X I-X B-X I-Y", [(0, 1, "X"), (2, 2, "X"), (3, 3, "Y")]),
                            ("O I-X O I-X", [(1, 1, "X"), (3, 3, "X")]),
                            ("S-X S-X B-X E-X I-X", [(0, 0, "X"), (1, 1, "X"), (2, 3, "X"),
                                                     (4, 4, "X")]),
                            ("U-X B-Y I-Y L-Y L-Y", [(0, 0, "X"), (1, 3, "Y"), (4, 4, "Y")]),
                            ("S-X I-X U-X E-X", [(t, t, "X") for t in range(4)])]:
            self.assertEqual(spans_of(tags.split()), spans, tags)

def leaves(content):
    """Everything in nested dicts and lists, tensors bit by bit, with the keys that lead there."""
    if isinstance(content, (dict, list, tuple)):
        pairs = content.items() if isinstance(content, dict) else enumerate(content)
        return [(key, *leaf) for key, value in pairs for leaf in leaves(value)]
    return [(content.numpy().tobytes() if torch.is_tensor(content) else content,)]

class SamplingTest(unittest.TestCase):
    """Draws of tasks against their frequencies, and batches against the list of all documents."""
    def test_frequencies_and_same_draws(self):
        sizes = [3000, 1500, 500]
        for schedule, share in [("proportional", [0.6, 0.3, 0.1]), ("uniform", [1 / 3] * 3)]:
            self.assertEqual(train.sampling_probabilities(schedule, sizes).tolist(), share)
            plan, again, other = [train.plan_epoch(schedule, sizes, np.random.default_rng(seed))
                                  for seed in (0, 0, 1)]
            self.assertTrue(np.allclose(np.bincount(plan) / 5000, share, atol=0.02), schedule)
            self.assertTrue(plan == again != other)

    def test_every_batch_of_a_pass_once_and_alike_in_length(self):
        task, = tiny_tasks(("ner",), n=50)
        number = {id(d): i for i, d in enumerate(task.data["train"])}
        endless = task.batches(4, 0)
        batches = [[number[id(d)] for d in next(endless)] for _ in range(26)]
        for one_pass in (batches[:13], batches[13:]):
            self.assertEqual(sorted(itertools.chain(*one_pass)), list(range(50)))
        self.assertNotEqual(batches[:13], batches[13:])
        plans = [tasks.plan_batches(range(1, 101), 10, np.random.default_rng(i)) for i in range(2)]
        self.assertLess(max(max(batch) - min(batch) for batch in plans[0]), 35)
        shortest = [min(batch) for batch in plans[0]]
        self.assertNotEqual(shortest, sorted(shortest))
        self.assertFalse(set.intersection(*({*map(frozenset, plan)} for plan in plans)))

    def test_batches_from_a_start_equal_those_of_an_uninterrupted_generator(self):
        for task in tiny_tasks(("ner", "coref"), n=10):           # passes of 3 and of 10 batches
            found = [[[id(d) for d in batch] for batch in itertools.islice(generator, 25)]
                     for generator in [task.batches(4, 7, start) for start in range(22)]]
            for start, batches in enumerate(found):
                self.assertEqual(batches[:25 - start], found[0][start:])

@mock.patch.object(train, "load_tasks", lambda settings: tiny_tasks(settings.tasks, n=6))
class TrainingTest(unittest.TestCase):
    """Steps, epochs, scores and files: against scripted scores, copies of weights, autograd, one
    process, and the same run without interruption."""
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def trainer(self, *names, folder="run", **changes):
        return tiny_trainer(names or ALL, self.folder / folder, 6, device="cpu", **changes)

    def files(self, folder="run"):
        return {path.name: path.read_bytes() for path in (self.folder / folder).iterdir()}

    def assert_same(self, one, other):
        self.assertTrue(leaves(one) == leaves(other))

    def scripted(self, trainer, dev):
        """Replaces the scores on dev by {task: a number for every epoch}."""
        trainer.evaluate = lambda task, split: {
            task.validation_metric_name: float(dev[task.name][len(trainer.history)])}

    def test_everything_random_depends_on_seed_and_epoch(self):
        def weights(seed):
            model = train.build(Settings(tasks=("rel",), seed=seed))[2]
            return [p for p in model.parameters() if p.ndim == 2]
        one, same, other = map(weights, (0, 0, 1))
        self.assertTrue(all(map(torch.equal, one, same)))
        self.assertFalse(any(map(torch.equal, one, other)))
        ner, emd = tiny_tasks(("ner", "emd"), n=30)
        emd.data = ner.data
        orders = {str([[id(d) for d in next(batches)] for _ in range(8)])
                  for batches in (ner.batches(4, 0), ner.batches(4, 1), emd.batches(4, 0))}
        self.assertEqual(len(orders), 3)

        def epoch(number, seed=0):
            """The plan of an epoch, and the random numbers of its steps."""
            trainer, drawn = self.trainer(seed=seed), []
            trainer.train_step = lambda task: drawn.append((task.name, *torch.rand(1).tolist())) \
                or torch.zeros(1)
            trainer.train_epoch(number)
            return zip(*drawn)
        plan, numbers = epoch(0)
        self.assertEqual([*epoch(0)], [plan, numbers])
        for other in (epoch(1), epoch(0, seed=1)):
            self.assertFalse({plan, numbers} & {*other})

    def test_every_task_has_its_own_adam_over_the_whole_model(self):
        trainer = self.trainer("ner", "rel", clip=1e-3)
        trainer.model.train()
        trainer.train_step(trainer.tasks[0])
        gradient = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
        self.assertAlmostEqual(torch.cat(gradient).norm().item(), 1e-3, places=6)     # clipped
        self.assertTrue(trainer.optimizers["ner"].state)
        self.assertFalse(trainer.optimizers["rel"].state)
        parameters = [*map(id, trainer.model.parameters())]
        for optimizer in trainer.optimizers.values():
            self.assertEqual([*map(id, optimizer.param_groups[0]["params"])], parameters)

    def test_a_step_knows_nothing_of_the_step_before(self):
        trainer, gradients = self.trainer("ner", lr=1e-9, clip=1e9), []
        task, documents = trainer.tasks[0], next(trainer.batches["ner"])
        trainer.batches["ner"] = itertools.repeat(documents)
        trainer.model.train()
        for _ in range(2):
            trainer.train_step(task)
            gradients.append(trainer.model.heads["ner"].emit.weight.grad.clone())
        torch.testing.assert_close(*gradients)
        for split in ("dev", "test", "dev"):                      # each starts from nothing
            scores, metric = trainer.evaluate(task, split), trainer.model.metrics["ner"]
            self.assertEqual(metric.compute(), scores)
            n_gold = sum(len(d.annotations["ner"][0]) for d in task.data[split])
            self.assertEqual(metric.counts["f1"][3], n_gold)
            self.assertEqual(sum(x[3] for x in metric.counts.values()), 2 * n_gold)   # all labels
        trainer.train_step = mock.Mock(side_effect=map(torch.tensor, [1.0, 5.0]))
        self.assertEqual(trainer.train_epoch(0), {"ner": 3.0})    # the mean loss, not the sum

    def test_best_epoch_and_patience(self):
        for scores, best, waited in [([0.0], 0, 0), ([0.0, 0.0, 0.0], 0, 0), ([1.0, 1.0], 0, 1),
                                     ([1.0, 2.0], 1, 0), ([3.0, 1.0, 2.0], 0, 2),
                                     ([0.0, 4.0, 3.9, 4.0], 1, 2), ([0.0, 0.0, 1.0], 2, 0)]:
            found = train.best_epoch(scores), train.epochs_waited(scores)
            self.assertEqual(found, (best, waited))

    def test_best_weights_and_results_are_of_the_right_epochs_and_documents(self):
        dev = {"ner": [40, 20, 30, 20, 45], "rel": [10, 5, 20, 10, 25]}      # ner should decrease
        best = {"ner": 2, "rel": 5, "mean": 3}         # the first of [-15.0, -7.5, -5, -5, -10]
        trainer, weights = self.trainer("ner", "rel"), {}
        trainer.tasks[0].validation_metric_decreases = True
        self.scripted(trainer, dev)
        with contextlib.redirect_stdout(io.StringIO()) as screen:
            for n in range(1, 6):
                trainer.train(n)
                weights[n] = copy.deepcopy(trainer.model.state_dict())
        self.assertEqual(re.findall(r"ner loss +\S+ dev +(\S+)", screen.getvalue()),
                         ["40.0*", "20.0*", "30.0", "20.0", "45.0"])
        for kept in (trainer.best, train.load(trainer.folder / "checkpoint.pt")["best"]):
            self.assert_same(kept, {name: weights[best[name]] for name in kept})
        self.assert_same(train.load(trainer.folder / "model.pt")["model"], weights[3])

        def evaluate(model, vocabulary, task, documents):
            """Ten times the epoch of the weights, and 1 more on test."""
            epoch, = [n for n in weights if leaves(weights[n]) == leaves(model.state_dict())]
            split, = [split for split in task.data if task.data[split] is documents]
            return {task.validation_metric_name: 10.0 * epoch + (split == "test")}
        del trainer.evaluate
        with mock.patch.object(train, "evaluate", evaluate):
            results = trainer.final_scores()
        self.assert_same(trainer.model.state_dict(), weights[3])      # the one model predicts
        with contextlib.redirect_stdout(io.StringIO()) as screen:
            train.finish_run(trainer, results)
        content = json.loads((trainer.folder / "results.json").read_text())
        self.assertEqual((content["tasks"], content["one_model_epoch"]), (results, 3))
        for name, score, own in ("ner", "f1", 2), ("rel", "last-token", 5):
            self.assertEqual(results[name], {
                "own_best": {"dev": {score: 10 * own}, "test": {score: 10 * own + 1}},
                "one_model": {"dev": {score: 30}, "test": {score: 31}},
                "steps": trainer.steps[name], "best_epoch": own, "best_dev": dev[name][own - 1]})
            self.assertRegex(screen.getvalue(), rf"{name} {score} +{own}1.00 +31.00 +{own}0.00\n")

    def test_learning_rate_is_halved_after_epochs_without_a_best(self):
        dev = {"ner": [0, 0, 0, 0, 10, 10.0005, 10.0005, 10, 5, 5, 20, 30],
               "emd": [1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 9],
               "rel": [9, 8, 7, 7, 7, 7, 6, 5, 4, 3, 2, 1]}
        trainer = self.trainer(*dev, lr_patience=1)
        trainer.tasks[2].validation_metric_decreases = True
        trainer.train_epoch = lambda epoch: {}
        self.scripted(trainer, dev)
        quietly(trainer.train, 12)
        rates = {name: [row["lr"][name] / TINY.lr for row in trainer.history] for name in dev}
        self.assertEqual(rates, {"ner": [1] * 8 + [0.5] * 2 + [0.25] * 2, "emd": [1] * 11 + [0.5],
                                 "rel": [1] * 5 + [0.5] * 7})

    def test_training_ends_when_every_task_has_waited(self):
        trainer = self.trainer("ner", "emd", patience=2)
        self.scripted(trainer, {"ner": [5, 4, 3, 2, 1, 0, 0], "emd": [0, 0, 1, 2, 1, 1, 1]})
        with contextlib.redirect_stdout(io.StringIO()) as screen:
            trainer.train(50)
        cells = re.findall(r"emd loss +\S+ dev +(\S+)", screen.getvalue())
        self.assertEqual(cells, ["0.0", "0.0", "1.0*", "2.0*", "1.0", "1.0"])

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
        chosen = choose_tasks(ALL)
        for task in chosen:                                       # emd has no span at all
            task.data = dict.fromkeys(("train", "dev", "test"), task.examples(odd))
        with mock.patch(f"{__name__}.tiny_tasks", lambda *_: chosen):
            trainer = self.trainer(batch_size=8, relation_units=3)
        trainer.plan = lambda rng: [0, 1, 2, 3, 3, 3, 3]          # all documents, in all tasks
        quietly(trainer.train, 1)
        losses = trainer.history[0]["loss"]
        self.assertEqual([name for name in ALL if math.isfinite(losses[name])], [*ALL])
        self.assertEqual(trainer.history[0]["dev"]["emd"]["f1-recall"], 0.0)
        quietly(train.finish_run, trainer, trainer.final_scores())

    def test_each_task_overfits_eight_sentences(self):
        for name in ALL:
            trainer = tiny_trainer((name,), n=30, encoder=("1x24",), coref_units=24, lr=2e-2,
                                   relation_units=24, spans_per_token=1.0, batch_size=8)
            task, = trainer.tasks
            chosen = [d for d in task.data["train"] if any(d.annotations[task.annotation])]
            chosen = sorted(chosen, key=len)[:2 if name == "coref" else 8]     # 2 have 10 sentences
            task.data = dict.fromkeys(("train", "dev"), chosen)
            trainer.model.train()
            for _ in range(50 * task.n_batches(8)):
                trainer.train_step(task)
            self.assertEqual({*trainer.evaluate(task, "dev").values()}, {100.0}, name)

    def test_a_run_that_is_killed_and_resumed_equals_an_uninterrupted_one(self):
        patch = mock.patch.object(train, "evaluate", lambda *x, real=train.evaluate: {
            name: y + 1 for name, y in real(*x).items()})         # above 0, so that the rates fall
        for names, schedule in [(ALL, "proportional"), (("ner", "rel"), "successive"),
                                (("ner",), "successive")]:
            with patch, self.subTest(names=names):
                runs = [self.trainer(*names, folder=f"{len(names)}{n}", schedule=schedule, lr=1e-2,
                                     lr_patience=0, dropout=0.3, unknown=0.3, antecedents=9,
                                     spans_per_token=0.1) for n in range(2)]
                quietly(runs[0].train, 3)
                with mock.patch.object(runs[1], "train_step", side_effect=KeyboardInterrupt):
                    self.assertRaises(KeyboardInterrupt, quietly, runs[1].train, 1)
                for n in (2, 3):
                    runs[1] = quietly(train.resume, runs[1].folder)
                    quietly(runs[1].train, n)
                for run in runs:
                    quietly(train.finish_run, run, run.final_scores())
                for name in ("log.jsonl", "results.json"):
                    self.assertEqual(*[(run.folder / name).read_bytes() for run in runs])
                for name in ("checkpoint.pt", "model.pt"):        # with the best of every task
                    self.assert_same(*[train.load(run.folder / name) for run in runs])
                if names == ALL:
                    self.assertLess(min(runs[0].history[2]["lr"].values()), 1e-2)

    def test_a_new_run_refuses_a_folder_that_exists(self):
        quietly(self.trainer("ner").train, 1)
        before, another = self.files(), self.trainer("ner")
        self.assertRaisesRegex(InputError, r"run: expected a new folder.*--resume.*train\.resume\(",
                               another.train, 2)
        self.assert_same((self.files(), another.history), (before, []))

    def test_a_metric_that_the_head_does_not_count_is_refused_before_the_first_epoch(self):
        for names, wrong, counted in [("ner", "f1 PER", "f1"), ("rel", "boundaries", "last-token"),
                                      ("ner rel", "f1", "last-token, boundaries, strict"),
                                      ("coref", "f1", "muc, b_cubed, ceaf_e, mean")]:
            trainer = self.trainer(*names.split(), folder=names)
            task = trainer.tasks[-1]
            task.validation_metric_name = wrong
            with self.assertRaisesRegex(InputError, f"^validation_metric_name of {task.name}: "
                                        f"expected one of {counted}, found {wrong}$"):
                trainer.train(1)
            self.assertFalse(trainer.folder.exists())
            task.validation_metric_name = counted.split(", ")[-1]
            quietly(train.start_run, trainer)

    def test_weights_that_are_not_finite_stop_the_run_before_anything_is_written(self):
        for name in ALL:
            trainer = self.trainer(name, folder=name)
            quietly(trainer.train, 1)
            before, weight = self.files(name), next(trainer.model.heads[name].parameters())
            weight.register_hook(lambda gradient: gradient * math.inf)
            with self.assertRaisesRegex(InputError, "epoch 2: expected finite weights.*keeps the"):
                quietly(trainer.train, 2)
            self.assert_same(self.files(name), before)

    def test_a_full_disk_leaves_the_file_of_before(self):
        path = self.folder / "model.pt"
        train.write(path, {"n": 1})
        for place, name, error in (os, "fsync", OSError), (torch, "save", RuntimeError):
            with mock.patch.object(place, name, side_effect=error("disk full")), \
                    self.assertRaisesRegex(InputError, "model.pt: .* intact: .*disk full"):
                train.write(path, {"n": 2})
            self.assertEqual(train.load(path), {"n": 1})
        train.write(path, {"n": 3})
        self.assertEqual((train.load(path), os.listdir(self.folder)), ({"n": 3}, ["model.pt"]))

    def test_the_successive_schedule_holds_all_but_the_heads(self):
        trainer = self.trainer(schedule="successive")
        heads = {*map(id, trainer.model.heads.parameters())}
        self.assertEqual(sorted(map(id, trainer.shared)),         # each is held once
                         sorted({*map(id, trainer.model.parameters())} - heads))

    def test_successive_tasks_hold_what_the_task_before_has_left(self):
        trainer = self.trainer("ner", "rel", schedule="successive", successive_delta=0.3)
        weights, real, seen = [*trainer.model.parameters()], trainer.loss, []

        def watched(task, batch):
            """The loss of a step, once its gradient equals that of the plain formula."""
            seen.append((task.name, [p.detach().clone() for p in trainer.shared]))
            anchor = seen[(len(seen) - 1) // 2 * 2][1]            # a turn has two steps
            losses = [trainer.model(task.name, batch)["loss"], real(task, batch)]
            if len(seen) > 2:
                losses[0] = losses[0] + 0.3 * sum(((p - q) ** 2).sum()
                                                  for p, q in zip(trainer.shared, anchor))
            torch.testing.assert_close(*[torch.autograd.grad(
                x, weights, retain_graph=True, materialize_grads=True) for x in losses])
            return losses[1]
        trainer.loss = watched
        for epoch in range(2):
            trainer.train_epoch(epoch)
        self.assertEqual([name for name, _ in seen], ["ner", "ner", "rel", "rel"] * 2)

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
    """Mutates n files of every kind; returns how many were refused. The others are read with spans
    that hold, and survive a round trip; a checkpoint, whose repr shows all, is as it was."""
    rng, refused, path, equal = random.Random(seed), 0, folder / "fuzzed", np.testing.assert_equal
    document = tasks.to_json(builtin_documents(1, np.random.default_rng(0))[0]).encode()
    columns = b"-DOCSTART- O\n\nAda B-PER\nKell I-PER\nleft O\n\nNew York\tS-LOC\n"
    text = "Dr. Jose\u0301 Kell, 5\u20e3, left.\n\n- 👍\u200d At 5 p.m.\r\n1. He (Bo) left.".encode()
    vectors = b"the 1.5 -2 3e-1\nof 0 1 2\n. . 1 2 3\n"
    checkpoint = {"model": {"a": torch.arange(50.0)}, "words": ["the", "of"], "n": 3}
    train.write(path, checkpoint)

    def check_documents(documents):
        for d in documents:
            if d.offsets is not None:
                text = "".join(tasks.read_lines(path))
                assert [[text[a:b] for a, b in row] for row in d.offsets] == d.sentences, text
            path.write_text(tasks.to_json(d), encoding="utf-8")
            assert tasks.read_json(path) == [replace(d, offsets=None)], d
            whole = replace(d, annotations={"clusters": d.annotations.get("clusters", [])})
            for parts in sentences_of(d), quietly(cut_documents, [whole], 1):
                assert sum(map(len, parts)) == len(d)
                assert all(0 <= row[0] <= row[1] < len(part) for part in parts
                           for lists in part.annotations.values() for row in sum(lists, []))

    kinds = [(document, tasks.read_json, check_documents),
             (columns, lambda p: tasks.read_columns(p, "ner"), check_documents),
             (text, lambda p: [tasks.read_text(p)], check_documents),
             (vectors, tasks.read_vectors, lambda x: equal(len(x[0]), len(x[1]))),
             (path.read_bytes(), train.load, lambda x: equal(repr(x), repr(checkpoint)))]
    for data, read, check in kinds * n:
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
    """What the three classes below share: a folder, a document, and refusals in one line."""
    GOOD = {"doc_key": "d", "sentences": [["Ada", "Kell", "left"], ["Bo"]],
            "ner": [[[0, 1, "PER"]], [[3, 3, "PER"]]], "relations": [[[0, 1, 2, 2, "R"]], []],
            "clusters": [[[0, 1], [3, 3]]]}

    def setUp(self):
        self.folder = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder)
        self.path = self.folder / "train.json"

    def write(self, row, *splits):
        for split in splits or ("train", "dev", "test"):
            (self.folder / f"{split}.json").write_text(json.dumps(row))

    def refused(self, pattern, call, *arguments):
        self.assertRaisesRegex(InputError, rf"\A.*{pattern}.*\Z", call, *arguments)

    def refused_texts(self, pattern, read, *texts):
        for text in texts:
            self.path.write_text(text)
            self.refused(pattern, read, self.path)

    def on_stderr(self, call, *arguments):
        with contextlib.redirect_stderr(io.StringIO()) as said:
            return call(*arguments), said.getvalue()

class FileTest(InputTest):
    """Files are read as is written here by hand, and damaged ones are refused in one line."""
    def test_documents_in_all_their_forms(self):
        twice = {"extra": 1, "ner": [[[0, 1, "PER"]] * 2, [[3, 3, "PER"]]]}
        self.path.write_text("\ufeff\n \ufeff" + json.dumps(self.GOOD | twice) + "\n\ufeff\n")
        document, = tasks.read_json(self.path)
        self.assertEqual(json.loads(tasks.to_json(document)), self.GOOD)
        self.assertEqual(sentences_of(document)[1], Document(
            "d", [["Bo"]], {"ner": [[(0, 0, "PER")]], "relations": [[]]}))
        flat = [[4, 4, "X"], [0, 1, "X"], [2, 2, "Y"], [1, 1, "Y"], [3, 4, "Z"], [0, 1, "X"]]
        row = {"sentences": [["a", "b"], [], ["c"], ["d", "e"]], "ner": flat, "emd": flat,
               "relations": [], "clusters": [[], [[3, 3], [0, 1]], []]}
        self.path.write_text("\n".join(json.dumps(row | {"doc_key": k}) for k in ("d", 2.5, None)))
        documents = tasks.read_json(self.path)
        self.assertEqual([d.key for d in documents], ["d", "2.5", f"{self.path}:3"])
        lists = [[(0, 1, "X"), (1, 1, "Y")], [], [(2, 2, "Y")], [(4, 4, "X"), (3, 4, "Z")]]
        self.assertEqual(documents[0].annotations, {
            "ner": lists, "emd": lists, "relations": [[]] * 4, "clusters": [[(3, 3), (0, 1)]]})
        self.assertEqual(sentences_of(documents[0])[1].annotations["ner"], [[(0, 0, "Y")]])

    def test_an_annotation_that_no_task_of_the_run_uses_may_have_defects(self):
        self.write(self.GOOD | {"clusters": [[[0, 9]]]})
        settings = replace(TINY, tasks=("ner", "rel"), data=(str(self.folder),))
        self.assertEqual([len(task.data["dev"]) for task in train.load_tasks(settings)], [2, 2])
        settings.tasks = "ner", "coref"
        self.refused("line 1, clusters: .* < 4", train.load_tasks, settings)

    def test_malformed_documents(self):
        def check(pattern, key, *values):
            rows = [json.dumps(self.GOOD) + "\n" + json.dumps(self.GOOD | {key: v}) for v in values]
            self.refused_texts(f"train.json, line 2.*{pattern}", tasks.read_json, *rows)
        check("sentences as lists of words", "sentences", None, "text", [["a", 1]])
        check("words with characters", "sentences", [["a", " "]])
        check("valid characters", "sentences", [["\ud800"]])
        for key in ("ner", "emd"):
            check(f"{key}.*one list for each of the 2", key, [[]], [3, []], {}, 3, [[0, 0, "P"], 3])
            check("valid characters", key, [[[0, 1, "\ud800"]], []])
            for row in ([0, 3, "P"], [2, 3, "P"], [1, 0, "P"], [-1, 0, "P"], [0, 1, 2], [0, 1],
                        [0, True, "P"], [0.0, 1, "P"], [0, 1, ""], 3):
                check(rf"{key}: expected \[int, int, str\] with 0 <= start <= end < 3 and a label, "
                      "found " + re.escape(json.dumps(row)), key, [[row], []])
            check("0 <= start <= end < 3 .*found .2, 3", key, [[2, 3, "P"]])            # flat
            check("3 <= start <= end < 4", key, [[4, 4, "P"]], [[], [[0, 0, "P"]]])
            check("0 <= start <= end < 3", key, [[-1, 0, "P"]])
        check(r"relations: expected \[int, int, int, int, str\]", "relations",
              [[[0, 1, 2, 4, "R"]], []], [[[0, 1, "R"]], []], [[0, 1, 3, 3, "R"]])
        check(r"\[int, int\] with 0 <= start <= end < 4", "clusters", [[[0, 9]]], [[0, 1]])
        check("at most one cluster", "clusters", [[[0, 1]], [[0, 1]]])
        check("clusters: expected lists", "clusters", 5)
        self.refused_texts("line 1: expected one JSON object", tasks.read_json,
                           '{"sentences": [', "[1, 2]", "nonsense", "[" * 100000, "1" * 5000)
        self.path.write_bytes(b'{"sentences": [["\xff"]]}')
        self.refused("UTF-8", tasks.read_json, self.path)

    def test_columns_and_vectors(self):
        self.path.write_text("Jose\u0301 1 2\n")
        self.assertEqual(tasks.read_vectors(self.path)[0], ["jos\u00e9"])
        def read(path):
            return tasks.read_columns(path, "ner")
        self.path.write_text(
            "-DOCSTART- -X- O O\n\nAda NNP B-PER\n\ufeffKell NNP I-PER\nleft VBD O\n\ufeff\n\n"
            "New York \tB-LOC\n\ufeff-DOCSTART- O\n10\xa0000 B-PER\n\xa0Bo\xa0\tB-PER\n")
        self.assertEqual([d.sentences for d in read(self.path)],
                         [[["Ada", "Kell", "left"]], [["New York"]], [["10\xa0000", "Bo"]]])
        self.assertEqual(read(self.path)[0].annotations, {"ner": [[(0, 1, "PER")]]})
        self.refused_texts("line 2: expected a tag", read, "O O\nO X-P", "O O\nO B-", "O O\nO b-P")
        self.refused_texts("line 1: expected a word and", read, "Ada", "\tB-PER", "\xa0 B-PER")
        self.refused_texts("line 1001: expected an empty line", read, "a O\n" * 1001)
        self.path.write_text("a O\n" * 1000 + "\n" + "a O\n" * 1000)
        self.assertEqual(list(map(len, read(self.path))), [1000, 1000])
        self.refused_texts("line 2: expected a word and 2 numbers", tasks.read_vectors,
                           "a 1 2\nb 1", "a 1 2\nb 1 x", "a 1 2\nb 1 nan", "a 1 2\nb 1 1e39")
        self.refused_texts("a word and its numbers", tasks.read_vectors, "", "a\n")
        self.path.write_text("2 3\nThe\t1 2  3\n\ufeff. . 4 5 6\nthe 7 8 9\n")
        words, vectors = tasks.read_vectors(self.path)
        self.assertEqual((words, vectors.tolist()), (["the", ". ."], [[1, 2, 3], [4, 5, 6]]))

    def test_sentences_of_more_than_300_words(self):
        self.write({"sentences": [["a"] * 300, [], ["b"] * 301], "ner": [], "relations": []})
        ner, rel = choose_tasks(["ner", "rel"])
        self.refused("train.json, .*:1, sentence 3: expected at most 300 words .*rel, found 301$",
                     tasks.read_documents, self.path, rel)
        document, = tasks.read_documents(self.path, ner)               # reads it whole
        document.offsets = [[(0, 1)] * 300, [], [(2, 3)] * 301]
        cut = Document(document.key, [["a"] * 300, [], ["b"] * 300, ["b"]],
                       offsets=[[(0, 1)] * 300, [], [(2, 3)] * 300, [(2, 3)]])
        for longer, said in (document, "here: cut: a sentence of more than 300 words\n"), (cut, ""):
            self.assertEqual(self.on_stderr(tasks.cut_sentences, longer, "here"), (cut, said))

    def test_folders(self):
        task, = choose_tasks(["rel"])
        self.refused("train.json", task.load_data, self.folder)
        self.write(self.GOOD | {"relations": None})
        self.write(self.GOOD, "train")
        self.refused("dev documents with the key 'relations'", task.load_data, self.folder)
        self.path.write_text("")
        self.refused("train documents", task.load_data, self.folder)
        self.write(self.GOOD | {"relations": [[], []]}, "train")
        self.refused("train documents.* found only empty", task.load_data, self.folder)
        (self.folder / "train.conll").write_text("a O\n")
        self.refused("found train.json and train.conll", task.load_data, self.folder)
        for data, pattern in [("foo=x", "one of the tasks"), ("ner=x", "a value for the task rel")]:
            self.refused(f"--data: expected {pattern}", train.load_tasks,
                         replace(TINY, tasks=("ner", "rel"), data=(data,)))

    def test_mutated_files_are_read_rightly_or_refused(self):
        self.assertTrue(150 < self.on_stderr(fuzz, 150, self.folder)[0] < 600)

class RawTextTest(InputTest):
    """Raw text against sentences and words marked by hand: | ends a sentence, or parts words."""
    def sentences(self, text):
        """The sentences of raw text, the same with line ends of Windows. Offsets point at words."""
        for version in (text.replace("\n", "\r\n"), text):
            document = tasks.parse_text(version)
            found = [[version[a:b] for a, b in row] for row in document.offsets]
            self.assertEqual([document.sentences, tasks.parse_text(text).sentences], [found, found])
        return found

    def check_ends(self, *texts):
        for text in texts:
            self.assertEqual(["".join(words) for words in self.sentences(text.replace("|", " "))],
                             ["".join(part.split()) for part in text.split("|")])

    def test_where_sentences_end(self):
        self.check_ends(
            "It fell on Jan. 14, 2016.|He left St. Louis.|John F. Kennedy met Ana P. Ruiz",
            "It began at 5 p.m. on Monday.|It ended at 6 p.m.|The firm left at 7 p.m. Bo",
            "The small, i.e. Nordex, fell.|U.S. President Bo met Acme Co. Chairman Zor",
            "He met Nordex Inc.|The firm is No. 5 of 9.|Is it?|No.|Ten left Acme Inc. Bo",
            "Well... yes.|Well... Ada left.|He left ...|The firm stayed!|5 left.|Bo?!|Ada",
            "From the U.S.?|Is it Acme Inc.?|See p. 12 of Gov. Bo.|What...?|Nobody",
            "He left.|Étienne stayed.|Łódź fell. iPads rose.|“Öl” fell.|($5) left",
            'He said: "I left."|"No!"|Bo said.|(It is so.)|“The firm left.”|She left.',
            "Ella vino.|¿quién es?|¡no!|“¿Qué?”|Dijo: ¿qué?|¡Ay!|¿Y Acme Inc.|¿no?",
            'Nordex\nbuys\nAda\n5 plants|\n \t\n\n"Ada left,"\nBo said\nand left.|\nHe met|\n\nBo')

    def test_abbreviations_and_lists(self):
        never = "al. Fig. Figs. Eq. Eqs. Sec. Tab. Ref. vol. pp. ca. approx. Dept. Univ. Pres."
        for word in ["Inc.", "Jan.", "U.S.", "p.m.", "J.", "etc.", "...", "…", *never.split()]:
            for following in ("5 left", "(2019) left", "[5a] left", "left", "Bo left"):
                words, = self.sentences(f"He saw {word} {following}")
                self.assertEqual(words[2], word)
            self.check_ends(f"He saw {word}{' ' if word in never.split() else '|'}The firm")
        # A line that begins with a bullet or a number begins a sentence, which it belongs to.
        self.check_ends("It has:|\n- Ada left|\n* Bo left|\n\t• No. 5 left|\n1. Kell left|\n12) 5 |"
                        "\na) Zor left.|Bo left|\n- and", "10. Oct. 5|\n2.\t“The” one.|He",
                        "It fell - by\n1.5 points\n-5 or\n2019.|Then\n(1) a -\n*and so 1) on",
                        "He reads cbc.ca.|She left.", "The then-Sen. Kell met ex-Gov. Zor")

    def test_words_of_raw_text(self):
        for text in ["Dr. Ada Kell left the U.S. in 1998|. She|'s (|now|) home|! She does|n't\n\n5",
                     "O'Brien and d'Aubert|, a 56-year-old|, met O’Brien-Zor on 3/4/2020 at 5:30|.",
                     "It paid $1.5bn or €2m|, 10%|, to Kell & Zor|, AT&T -- the 1990s|... (|2nd|)",
                     "See https://a.org/b?c=d_e/f and www.b.com/x|, or ada.kell@mail.b-c.org|.",
                     "She|'s here|, they do|n't|, we|'ll|, he ca|n’t|, I|'m|, Ada|’s|, I|'ve 1,000",
                     "we|'re told|, he|'d go|--|or not|, by Acme Co. on Jan. 4|, i.e. at 5 p.m.",
                     "Jose\u0301 D'Aubert|, of Zu\u0308rich|, co\xadoperates|.\ufeff do\xad|n't",
                     "Mr\u200b. Kell\u200bZor|’\u200ds ❤\ufe0f|! 👨\u200d|👩\u200d|👧 👍|🏽 हिन्दी|.",
                     "He has 5\u20e3 in plan C|.\n\nBo left"]:
            self.assertEqual(sum(self.sentences(text.replace("|", "")), []),
                             text.replace("|", " ").split())

    def test_accents_and_invisible_characters_belong_to_the_word_before_them(self):
        for char in map(chr, range(sys.maxunicode + 1)):
            if unicodedata.category(char) in ("Mn", "Mc", "Me", "Cf"):
                self.assertEqual(self.sentences(f"A{char}b{char} c"), [[f"A{char}b{char}", "c"]])
        self.assertEqual(self.sentences("\u200b Ada \u0301\n\ufeff\nleft"), [["Ada"], ["left"]])
        document = tasks.parse_text("\u200bAda\u0301 👍 left.\n\nBo")
        self.assertEqual(document.offsets, [[(1, 5), (6, 7), (8, 12), (12, 13)], [(15, 17)]])
        self.refused_texts("some text", tasks.read_text, "", " \n", "\u200b", "\u0301 \ufeff\n\xad")

    def test_what_is_no_prose_with_spaces_is_said_in_one_line(self):
        for text, said in [("他来了。Ad", "spaces"), ("カタかな", "spaces"), ("สวัสดีครับ Ada", "spaces"),
                           ("Ada B-X\nBo O\n\nC\tNN\tI-X\r\nO", "it .conll"), ("他来 is", ""),
                           ("Ada O\nBo B-X\nleft a-\nO B-", ""), ("안녕. 네!", ""), ("हिन्दी", "")]:
            self.path.write_bytes(text.encode())
            found = self.on_stderr(tasks.read_text, self.path)
            self.assertEqual(found[0], tasks.parse_text(text, "train"))
            self.assertRegex(found[1], rf"\A\S*train.json: .*{said}.*\n\Z" if said else r"\A\Z")

class CorpusTest(InputTest):
    """Training documents are cut and counted as by hand, and the built-in corpus is no look-up."""
    def test_long_documents_are_cut_between_sentences(self):
        document = Document("d", [["a", "b"], ["c", "d", "e"], [], ["f"], ["g", "h", "i", "j"]], {
            "clusters": [[(0, 0), (1, 1), (5, 5), (6, 6)], [(2, 2), (9, 9)],
                         [(3, 5), (2, 4), (0, 1)], [(7, 8)], [(4, 6)]]})
        for limit, expected in [(10, "abcdefghij"), (9, "abcdef ghij"), (4, "ab cdef ghij"),
                                (3, "ab cde f ghij"), (1, "ab cde f ghij"), (5, "abcde fghij")]:
            with contextlib.redirect_stdout(io.StringIO()) as said:
                parts = cut_documents([document], limit)
            self.assertEqual(["".join(sum(part.sentences, [])) for part in parts], expected.split())
            self.assertEqual(said.getvalue(), "" if limit == 10 else
                             f"cut: 1 training documents longer than --max-tokens {limit}\n")
        self.assertEqual([part.annotations["clusters"] for part in parts],
                         [[[(0, 0), (1, 1)], [(2, 4), (0, 1)]], [[(0, 0), (1, 1)], [(2, 3)]]])

    def test_only_training_documents_are_cut_and_single_spans_stay(self):
        self.write({"sentences": [["Ada", "likes", "Bo"], ["Ada", "left"]],
                    "clusters": [[[0, 0], [2, 2]], [[1, 1]]]})
        task, = choose_tasks(["coref"])
        quietly(task.load_data, self.folder, 3)
        self.assertEqual([[*map(len, part)] for part in task.data.values()], [[3, 2], [5], [5]])
        clusters = task.data["train"][0].annotations["clusters"]
        self.assertEqual(clusters, [[(0, 0), (2, 2)], [(1, 1)]])
        _, vocabulary, model = tiny_model(("coref",))
        model.heads["coref"].decode = lambda *_: [[[(0, 0), (2, 2)]]]
        model.eval()("coref", make_batch(task.data["test"], vocabulary))
        scores = model.get_metrics("coref")
        self.assertEqual((scores["ceaf_e-recall"], scores["ceaf_e-precision"]), (50.0, 100.0))

    def test_the_vocabulary_is_that_of_the_training_documents(self):
        for split in ("train", "dev", "test"):
            self.write({"sentences": [[split, "a"]], "ner": [[0, 0, split], [1, 1, "A"]]}, split)
        settings = tiny_settings(["ner"], data=(f"ner={self.folder}", "unused"))
        chosen, vocabulary, model = train.build(settings)
        self.assertEqual(vocabulary.words, ["", "<unknown>", "a", "train"])
        trainer = train.new_trainer(model, chosen, vocabulary, settings, "unused")
        state = train.model_state(trainer, model.state_dict())
        self.assertEqual(state["labels"], {"ner": ["A", "train"]})
        rebuilt, again, _ = train.restored(state, self.folder, "", {})
        self.assertEqual(vars(again), vars(vocabulary))
        torch.testing.assert_close(rebuilt.state_dict(), model.state_dict(), rtol=0, atol=0)
        other = state["vocabulary"] | {"words": ["", "b"], "counts": [1, 1]}
        for changes in {"labels": {"ner": ["X"]}}, {"vocabulary": other}:
            self.refused("expected files of train.py", train.restored, state | changes,
                         self.folder, "", {})

    def test_labels_unknown_to_training_are_misses(self):
        _, vocabulary, model = tiny_model(("ner", "rel"))
        document = Document("d", [["Ada", "left"]], {"ner": [[(0, 0, "NEW")]],
                                                     "relations": [[(0, 0, 1, 1, "NEW")]]})
        for name, score in (("ner", "f1"), ("rel", "last-token")):
            model.eval()(name, make_batch([document], vocabulary))
            self.assertEqual(model.get_metrics(name)[f"{score}-recall"], 0.0)

    def test_the_built_in_corpus_is_no_look_up(self):
        ner, emd, rel, coref = chosen = choose_tasks(ALL)
        for task in chosen:
            task.load_data()
            self.assertEqual(len({json.dumps(part[0].sentences) for part in task.data.values()}), 3)
            self.assertLessEqual(sum(len(d.sentences) for d in task.data["train"]), 5 * 300)
        def named(split, *tasks):
            return {(" ".join(d.sentences[0][a:b + 1]), label) for task in tasks
                    for d in task.data[split] for a, b, label in d.annotations["ner"][0]}
        known, test = (dict(named(split, ner, emd, rel)) for split in ("train", "test"))
        self.assertGreater(len(test.keys() - known), len(test) / 2)
        # More than 10 names are of two or all three types.
        self.assertGreater(len(named("train", ner)) - len(dict(named("train", ner))), 20)
        found = set()                                    # between a PER and an ORG
        for d in rel.data["train"]:
            types = {(a, b): label for a, b, label in d.annotations["ner"][0]}
            related = {(r[:2], r[2:4]): r[4] for r in d.annotations["relations"][0]}
            found |= {related.get(pair) for pair in itertools.permutations(types, 2)
                      if [types[x] for x in pair] == ["PER", "ORG"]}
        self.assertGreaterEqual(len(found), 3)           # two relations, and none
        mentions = {" ".join(sum(d.sentences, [])[a:b + 1]).lower() for d in coref.data["train"]
                    for cluster in d.annotations["clusters"] for a, b in cluster}
        self.assertLessEqual({"he", "she", "the company", "the town"}, mentions)
        again = builtin_documents(300, np.random.default_rng([0, *b"ner"]), "ner-train")
        self.assertEqual(ner.data["train"], sum(map(sentences_of, again), []))

def printed(call, *arguments):
    with contextlib.redirect_stdout(io.StringIO()) as screen:
        call(*arguments)
    return screen.getvalue()

class ScreenTest(unittest.TestCase):
    """What is printed says what holds: lines against documents that are annotated by hand."""
    def test_annotated_lines(self):
        document = Document("d", ["Ada Kell likes the firm".split(), [], ["She", "left", "it"]], {
            "ner": [[(0, 1, "PER")], [], [(5, 6, "X")]],
            "emd": [[(0, 1, "PER"), (0, 0, "A")], [], [(5, 5, "PER"), (6, 7, "Y")]],
            "relations": [[(3, 4, 0, 1, "R"), (0, 1, 3, 4, "S"), (0, 1, 3, 4, "P")], [], []],
            "clusters": [[(3, 4), (7, 7)], [(5, 5), (0, 1)]]})
        self.assertEqual(train.annotated_lines(document, document.annotations), [
            "[[Ada A] Kell PER #1] likes [the firm #2]", "    Ada Kell -- S -> the firm",
            "    Ada Kell -- P -> the firm", "    the firm -- R -> Ada Kell", "",
            "[[She PER #1] left X] [it #2]", "    left it Y"])         # it crosses "She left"
        self.assertEqual(train.annotated_lines(document, ["ner"]),
                         ["[Ada Kell PER] likes the firm", "", "[She left X] it"])

    def test_no_character_steers_the_screen(self):
        odd = "".join(map(chr, [*range(1, 32), *range(127, 160), 0x200e, 0x2028, 0x202e, 0x2066]))
        document = Document("d", [[f"a{odd}", "b", "é"]], {
            "ner": [[(0, 0, f"X{odd}"), (0, 1, "Y"), (1, 2, f"Z{odd}")]],
            "relations": [[(0, 0, 1, 1, f"R{odd}")]]})
        trainer = tiny_trainer(("ner",))
        trainer.tasks[0].data["test"] = [document]
        screen = printed(train.print_start, trainer) + printed(
            train.print_scores, {"F1": {odd: 1.0}}, [odd])
        self.assertIn(r"not in train: X\x01", screen)
        lines = train.annotated_lines(document, document.annotations) + screen.split("\n")
        self.assertFalse({*odd} & {*"".join(lines)})
        self.assertTrue(lines[0].startswith(r"[[a\x01\x02") and "é" in lines[0])

    def test_what_is_not_learned(self):
        trainer = tiny_trainer(("ner", "coref"))
        spans, cluster = [(0, 3, "PER"), (3, 5, "PER"), (6, 6, "PER")], [(0, 7), (2, 10)]
        document = Document("d", [["a"] * 12], {"ner": [spans], "clusters": [cluster]})
        trainer.tasks[0].data["train"] = trainer.tasks[1].data["train"] = [document]
        screen = printed(train.print_start, trainer)
        self.assertIn("\nner: not learned: 1 of 3 training spans, which overlap another\n", screen)
        self.assertRegex(screen, r"\ncoref: not learned: 1 of 2 .* more than --max-span 8 words\n")
        self.assertIn("\nner: not in train: LOC, ORG\n", screen)
        self.assertRegex(screen, r"ner +1 +12 +12  sentences +1 +0.500")
        trainer.model = tiny_trainer(("ner", "coref"), sharing="question").model
        self.assertNotIn("ner: not learned", printed(train.print_start, trainer))

class FolderTest(unittest.TestCase):
    """Tests that run train.py in a folder of their own."""
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(folder.name)

    def call(self, line, code="import train\ntrain.command_line()", name="train.py"):
        """(exit status, output, errors) of `python train.py LINE`, or of a script with a task."""
        out, err = io.TextIOWrapper(io.BytesIO(), "latin-1", write_through=True), io.StringIO()
        with mock.patch.dict(hmtl.HIERARCHY), mock.patch.dict(hmtl.HEADS), \
                mock.patch("tasks.TASKS", [*tasks.TASKS]), contextlib.redirect_stdout(out), \
                mock.patch("sys.argv", [name, *shlex.split(line)]), \
                contextlib.redirect_stderr(err), self.assertRaises(SystemExit) as end:
            exec(code, {"__name__": "__main__"})
        return end.exception.code, out.buffer.getvalue().decode(), err.getvalue()

    def output(self, line):
        with mock.patch("sys.argv", ["train.py", *shlex.split(line)]):
            return printed(train.main)

    def refused(self, line, pattern):
        with self.assertRaisesRegex(InputError, pattern, msg=line) as caught:
            self.output(line)
        self.assertNotIn("\n", str(caught.exception))

    def write_news(self, n):
        Path("news").mkdir()
        for i, split in enumerate(("train", "dev", "test")):
            documents = builtin_documents(n, np.random.default_rng(i))
            Path(f"news/{split}.jsonl").write_text("\n".join(map(tasks.to_json, documents)))

    def results(self, folder):
        return json.loads(Path(folder, "results.json").read_text())["tasks"]

class RunTest(FolderTest):
    """What is done with a run after its training, against its files and an uninterrupted run."""
    TRAIN = ("--tasks ner rel --data news --vectors vectors.txt --encoder 1x12 --char-filters 8 "
             "--relation-units 8 --lr 0.02 --dropout 0.1 --batch-size 4 --device cpu")
    files = {}

    def setUp(self):
        super().setUp()
        if not self.files:                     # it trains once, and every test gets the files
            self.write_news(12)
            Path("vectors.txt").write_text("The 0.1 0.2\nmet 0.3 0.4\nzebra 0.5 0.6\nin 0.7 0.8\n")
            RunTest.screen = self.output(f"{self.TRAIN} --run r --epochs 2")
            RunTest.files = {path: path.read_bytes() for path in Path().glob("**/*.*")}
        for path, data in self.files.items():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)

    def test_the_screen_says_what_the_files_say(self):
        changed = re.search(r"\nsettings: (.*)\n", self.screen)[1].split()
        self.assertEqual(train.parse(changed)[0], train.parse(
            f"{self.TRAIN} --epochs 2 --word-dim 2".split())[0])
        log = [json.loads(row) for row in Path("r/log.jsonl").read_text().splitlines()]
        lines = re.findall(r"^epoch .*$", self.screen, re.M)
        for (name, row), score in zip(self.results("r").items(), ("f1", "last-token")):
            best = 0
            for line, epoch in zip(lines, log, strict=True):
                dev, loss = epoch["dev"][name][score], epoch["loss"][name]
                best, star = max(best, dev), r"\*" if dev > best else ""
                self.assertRegex(line, f" {name} loss +{loss:.2f} dev +{dev:.1f}{star}( |$)")
            columns = row["own_best"]["test"], row["one_model"]["test"], row["own_best"]["dev"]
            cells = " +".join(f"{column[score]:.2f}" for column in columns)
            self.assertRegex(self.screen, f"\n{name} {score} +{cells}\n")
            self.assertEqual(bool(re.search(f"\n{name}: .*; --epochs 4 may help\n", self.screen)),
                             row["best_epoch"] == 2 or row["best_dev"] == 0)
        self.assertRegex(self.screen, r"\nstopped at epoch 2: .* number of epochs \(--epochs 2\)\n")
        line = re.search(r"\n +python train.py (.* --predict FILE)\n", self.screen)[1]
        self.assertIn("[", self.output(line.replace("FILE", "news/test.jsonl")))

    def test_a_run_out_of_patience_goes_on_with_a_larger_patience(self):
        state = train.load("r/checkpoint.pt")
        state["history"][0]["dev"] = {"ner": {"f1": 100.0}, "rel": {"last-token": 100.0}}
        state["best"]["mean"] = {name: 0 * x for name, x in state["best"]["mean"].items()}
        train.write(Path("r/checkpoint.pt"), state)
        screen = self.output("--run r --resume --epochs 3 --patience 1")
        self.assertRegex(screen, "\nstopped at epoch 2: no task .* for 1 epochs; .* --patience\n")
        self.assertNotRegex(screen, "\nepoch |may help")
        self.assertRegex(screen, r"\nner f1 +[1-9]\S+ +0\.00 +[1-9]")        # own best, one model
        screen = self.output("--run r --resume --epochs 3 --patience 4")
        self.assertRegex(screen, r"\nepoch   3 [^*]+\n")            # no new best

    def test_evaluate_prints_the_scores_of_the_one_model_label_by_label(self):
        for path, name in itertools.product(("news", "news/test.jsonl"), ("ner", "rel")):
            screen = self.output(f"--run r --evaluate {path}")
            table = screen.split(f"\n{name}: ")[1].split("\n\n")[0].splitlines()[2:]
            cells = {line[:24].strip(): line[24:].split() for line in table}
            scores = self.results("r")[name]["one_model"]["test"]
            self.assertTrue(name == "rel" or scores["f1 PER"])
            self.assertEqual({score: columns[:3] for score, columns in cells.items()}, {
                score: [f"{scores[score + kind]:.2f}" for kind in ("", "-precision", "-recall")]
                for score in scores if score + "-recall" in scores})
            whole, *labels = [np.float64(columns) for score, columns in cells.items()
                              if " " in score or score in ("f1", "last-token")]
            self.assertEqual([*whole[3:]], [*sum(labels)[3:]])
            self.assertAlmostEqual(whole[1] * whole[3], whole[2] * whole[4], delta=9)
            self.assertNotIn("not in train", screen)
        Path("x.jsonl").write_text('{"sentences": [["Ada"]], "relations": [[[0, 0, 0, 0, "Is"]]]}')
        self.assertRegex(self.output("--run r --evaluate x.jsonl"), "(?s)ner: .* 0 sentences with "
                         "the.*rel: .* 1 sentences with the key 'relations'\nrel: not in train: Is")
        Path("x.jsonl").write_text('{"sentences": [["Ada"]]}')
        self.refused("--run r --evaluate x.jsonl", "the key of a task of the run")
        self.refused("--run r --evaluate x", "x: expected a file of UTF-8 text: No such [^']*$")

    def test_a_bad_file_does_not_end_those_of_other_kinds(self):
        documents = [s for d in tasks.read_json("news/test.jsonl") for s in sentences_of(d)]
        Path("x.jsonl").write_text("\n".join(map(tasks.to_json, documents)))
        expected = self.output("--run r --predict x.jsonl")
        self.assertIn("[", expected)
        text = "".join(" x O\n".join([*d.sentences[0], "\n"]) for d in documents).encode()
        for path, data in [("x.conll", text), ("x.BIO", text), ("none.jsonl", b""),
                           ("long", b"word " * 20_000)]:
            Path(path).write_bytes(data)
        status, out, err = self.call("--run r --predict x.conll long")
        self.assertEqual((status, out.count("word"), out[:len(expected)]), (0, 20_000, expected))
        self.assertRegex(err, "^long, long: cut: .*\n$")
        status, out, err = self.call("--run r --predict nowhere x.BIO none.jsonl")
        self.assertEqual((status, out), (2, expected))
        self.assertRegex(err, "^train.py: nowhere: .*\ntrain.py: none.jsonl: expected docum.*\n$")

    def test_words_that_only_the_vector_file_has(self):
        for name, there in [("checkpoint.pt", False), ("model.pt", False), ("vectors.pt", True)]:
            self.assertEqual(b"zebra" in Path("r", name).read_bytes(), there, name)
        (model, vocabulary), documents = train.load_run("r"), [Document("d", [["Zebra", "left"]])]
        embedded, outputs = model.encode(make_batch(documents, vocabulary), ["ner"])
        torch.testing.assert_close(embedded[0, 0, :2], torch.tensor([0.5, 0.6]))
        del vocabulary.word_ids["zebra"]
        _, others = model.encode(make_batch(documents, vocabulary), ["ner"])
        self.assertGreater((outputs["ner"] - others["ner"])[0, 0].abs().max().item(), 1e-3)

    def test_a_resumed_run_equals_another_and_mends_what_a_kill_between_its_files_leaves(self):
        self.output(self.TRAIN + " --run s --epochs 3")
        Path("vectors.txt").unlink()
        self.output("--run r --resume --epochs 3")
        state, other = (train.load(f"{run}/checkpoint.pt") for run in "rs")
        self.assertEqual(state["history"], other["history"])
        torch.testing.assert_close(state["model"], other["model"], rtol=0, atol=0)
        Path("r/log.jsonl").write_bytes(self.files[Path("r/log.jsonl")])      # the log of before
        Path("r/model.pt").unlink()
        quietly(train.resume, "r")
        self.assertEqual(Path("r/log.jsonl").read_text(), Path("s/log.jsonl").read_text())
        torch.testing.assert_close(train.load("r/model.pt")["model"], other["best"]["mean"])

    def test_what_no_run_goes_on_from(self):
        class Evil:
            __reduce__ = lambda self: (os.mkdir, ("evil",))
        path, line = Path("r/checkpoint.pt"), "--run r --resume --epochs 3"
        state = train.load(path)
        torch.save(state | {"settings": Evil()}, path)
        self.refused(line, "checkpoint.pt: expected a file of train.py")
        self.assertFalse(Path("evil").exists())
        train.write(path, {"settings": {"epochs": 3}})
        self.refused(line, "r: expected files of train.py")
        train.write(path, state)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1                                  # a single bit
        path.write_bytes(data)
        self.refused(line, "checkpoint.pt: expected a file of train.py")
        train.write(path, state)
        for data in Path("news").iterdir():
            for old, new in ('"PER"', '"ORG"'), ('"sentences": [["', '"sentences": [["x'):
                data.write_text(data.read_text().replace(old, new, 1))
                self.refused(line, "--resume: expected the documents of the run, found others")
                data.write_bytes(self.files[data])
        for line in ("--run r --predict x", "--run r --resume", "--tasks ner --data news --run s"):
            self.refused(line + " --device meta", "--device meta")       # it has no numbers

    def test_the_number_of_threads_is_that_of_the_settings(self):
        self.addCleanup(torch.set_num_threads, 1)
        settings = Settings(tasks=("ner",), data=("news",), encoder=("1x8",), threads=2)
        for call, n in [(lambda: train.build(settings), 2), (lambda: train.load_run("r"), 1),
                        (lambda: train.resume("r", threads=2), 2)]:
            quietly(call)
            self.assertEqual(torch.get_num_threads(), n)

    def test_standard_input_is_predicted_and_a_reader_that_stops_is_no_error(self):
        Path("text").write_text("Ada Kell of Łódź left Warwick for Zorville last year\n\n" * 1500)
        line = [sys.executable, train.__file__, "--run", "r", "--predict", "-"]
        with open("text") as file, subprocess.Popen(
                line, stdin=file, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                env=os.environ | {"PYTHONIOENCODING": "latin-1"}) as process:    # of no effect
            self.assertIn("Łódź", process.stdout.readline().decode())
            process.stdout.close()
            self.assertEqual(process.stderr.read(), b"")

class FeaturesTest(FolderTest):
    """Contextual vectors that tell a word's place in its sentence, against the same function."""
    FILE = """
import numpy as np
def features(sentences):
    return [np.sin([[[t + (k + 1) * sum(map(ord, word)) + i for i in range(4)]
                     for t, word in enumerate(words)] for k in range(3)]) for words in sentences]
"""
    TRAIN = "--tasks ner rel --data news --features f.py --vectors v --encoder 1x12 --batch-size 4"

    def setUp(self):
        super().setUp()
        Path("f.py").write_text(self.FILE)
        Path("v").write_text("The 0.1 0.2\nin 0.3 0.4\n")         # no word of its own
        self.write_news(6)
        self.features = tasks.ContextualVectors("f.py")

    def test_every_word_gets_its_own_vectors_and_they_are_frozen(self):
        for projected in (0, 5):
            chosen, vocabulary, model = quietly(train.build, tiny_settings(
                ("ner", "coref"), data=("news",), device="cpu", contextual_dim=projected), "f.py")
            mixture, kept = model.embedder.mixture, model.embedder.contextual.kept
            before = copy.deepcopy([kept, mixture.weights])
            train.new_trainer(model, chosen, vocabulary, TINY, "unused").train_step(chosen[0])
            torch.testing.assert_close(kept, before[0], rtol=0, atol=0)
            self.assertFalse(torch.equal(mixture.weights, before[1]))
            with torch.no_grad():
                mixture.weights.copy_(torch.tensor([0.3, -1.0, 0.5]))
                mixture.gamma.fill_(1.7)
            share = 1.7 * np.exp([0.3, -1.0, 0.5]) / np.exp([0.3, -1.0, 0.5]).sum()
            for documents in (chosen[0].data["train"][:4], chosen[1].data["train"][:1]):
                batch = overpadded(make_batch(documents, vocabulary))
                embedded = model.eval().embedder(batch)
                plain = model.embedder.word_features(batch.word_ids, batch)
                arrays = self.features.function([w for d in documents for w in d.sentences])
                for row, which, array in zip(embedded, batch.which_word, arrays, strict=True):
                    mixed = torch.tensor(np.einsum("l,ltw->tw", share, array)).float()
                    expected = torch.cat([plain[which[:len(mixed)]], mixture.project(mixed)], 1)
                    padded = nn.functional.pad(expected, (0, 0, 0, len(row) - len(mixed)))
                    torch.testing.assert_close(row, padded, atol=1e-2, rtol=1e-2)

    def test_each_sentence_once_in_groups_of_like_lengths(self):
        chosen, vocabulary, model = tiny_model(("ner", "coref"))
        self.features.function = mock.Mock(side_effect=self.features.function)
        quietly(self.features.keep, chosen)
        calls = [call.args[0] for call in self.features.function.mock_calls]
        asked = [tuple(words) for group in calls for words in group]
        self.assertEqual(sorted(asked), sorted({
            tuple(words) for task in chosen for documents in task.data.values()
            for d in documents for words in d.sentences}))
        self.assertEqual(sorted(asked, key=len), asked)
        self.assertEqual({len(group) for group in calls[:-1]}, {32})
        self.assertEqual(self.features([["not", "kept"]]).shape, (3, 2, 4))
        self.features.function = None          # they are kept, and questions are no sentences
        labels = {"ner": chosen[0].labels(), "coref": []}
        model = hmtl.QuestionHMTL(chosen, labels, vocabulary, TINY, None, self.features)
        model("ner", make_batch(chosen[0].data["train"][:4], vocabulary))

    def test_a_run_resumes_predicts_and_evaluates_with_its_file(self):
        out = self.output(f"{self.TRAIN} --run r --epochs 1")
        self.assertRegex(out, r"(?s)features: \d+ sentences, 3 layers of width 4, .*\nsettings: "
                         "[^\n]* --features f.py\n")
        self.output("--run r --resume --epochs 2 --features f.py")
        f1 = self.results("r")["ner"]["one_model"]["test"]["f1"]
        self.assertRegex(self.output("--run r --evaluate news --features f.py"), rf"f1 +{f1:.2f} ")
        model, vocabulary = train.load_run("r", features="f.py")
        expected = [tasks.to_json(annotate(model, document, vocabulary))
                    for document in tasks.read_json("news/test.jsonl")]
        line = re.search(r"--run r .*--predict FILE.*", out)[0].replace("FILE", "news/test.jsonl")
        self.assertEqual(model.embedder.contextual.kept, {})            # a text may be long
        self.assertEqual(self.output(f"{line} --json").splitlines(), expected)

    def test_refusals(self):
        self.output(f"{self.TRAIN} --run r --epochs 1")
        self.output(f"{self.TRAIN.replace('--features f.py', '')} --run without --epochs 1")
        for line in ("--resume", "--predict news/test.jsonl", "--evaluate news"):
            self.refused(f"--run r {line}", "--features: expected a file, .* 4, found none")
            self.refused(f"--run r {line} --features no.py", "--features: expected .* found no.py")
            self.refused(f"--run without {line} --features f.py", "--features: expected none, as")
        inner = self.FILE.replace("features(", "f(") + "def features(s):\n return "
        here, shape = r"^g\.py, line 7: ", r"expected floats \(3, \d+ words, 4\), found "
        for result, pattern in [
                ("[x[:2] for x in f(s)]", shape + r"torch.float64 \(2, "),
                ("[x[:, :, :3] for x in f(s)]", shape + r".*, 3\)"),
                ("[x[:, 1:] for x in f(s)]", shape), ("[x[0] for x in f(s)]", shape),
                ("[x.astype(int) for x in f(s)]", shape + "torch.int"),
                ("[x * np.nan for x in f(s)]", "finite"), ("[x * 1e6 for x in f(s)]", "65504"),
                ("f(s)[1:]", "expected 32 arrays, found 31"), ("None", "a list of arrays: TypeE"),
                ("['a' for _ in s]", "a list of arrays"), ("{}['a']", here + "KeyError: 'a'$"),
                ("open('nowhere')", here + "FileNotFoundError: .*No such file.*nowhere"),
                ("eval('1 +')", here + "SyntaxError: invalid syntax")]:
            Path("g.py").write_text(inner + result)
            with self.subTest(result):
                self.refused("--run r --resume --epochs 2 --features g.py", pattern)
        for text, pattern in [("features = 3", r"g.py: expected a function features\(sentences\)"),
                              ("\ndef (", "^g.py: expected Python code: SyntaxError.*line 2"),
                              ("\nimport nowhere", "^g.py, line 2: ModuleNotFoundError: No mod")]:
            Path("g.py").write_text(text)
            for line in ("--run r --predict news/test.jsonl", "--tasks ner --data news --run new"):
                self.refused(f"{line} --features g.py", pattern)
        self.assertFalse(Path("new").exists())
        Path("g.py").write_text(f"import torch\ntorch.set_grad_enabled(False)\n{inner}"
                                "[torch.set_grad_enabled(False), f(s)][1]")
        self.output("--run r --resume --epochs 2 --features g.py")     # trains nevertheless

    def test_floats_of_any_kind(self):
        x = torch.randn(3, 3, 4)
        for array in (x.numpy(), x.double(), x.tolist(), x.half(), x.bfloat16(), nn.Parameter(x)):
            self.features.function = lambda sentences: [array]
            torch.testing.assert_close(self.features([["a"] * 3]), x.half(), atol=0.02, rtol=0.02)

class CommandLineTest(FolderTest):
    """Commands, also those of the README, do what they say, or say in one line what to mend."""
    def readme_code(self, part):
        blocks = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
        return next(block for block in blocks if part in block)

    def test_train_resume_predict(self):
        self.write_news(4)
        out = self.output("--data news --encoder 1x8 --coref-units 8 --dropout 0.4 --epochs 1")
        self.assertRegex(out, "(?s)share of steps.*last-token.*ceaf_e.*the run lies in")
        run = "runs/ner-emd-rel-coref"
        with mock.patch("train.run", side_effect=KeyboardInterrupt):      # none is overwritten
            self.refused("--data news", f"{run}-2: expected a run, found none")
        before = train.load(f"{run}/checkpoint.pt")["settings"]
        Path("news").rename("moved")
        self.output(f"--run {run} --resume --epochs 2 --data moved --patience 7 --device cpu")
        self.assertEqual(train.load(f"{run}/checkpoint.pt")["settings"], before | {
            "epochs": 2, "data": ("moved",), "patience": 7, "device": "cpu"})
        self.refused(f"--run {run} --resume --dropout 0.1", "expected 0.4.* found 0.1")
        self.refused(f"--run {run} --resume --epochs 1", "--epochs: expected at least the 2")
        self.refused(f"--run {run}", "--resume")
        text = "Ada Kell works for Nordex.\r\n She likes the café “Łódź”, Zu\u0308rich."
        Path("text").write_bytes(text.encode("utf-8-sig"))
        found = json.loads(self.output(f"--run {run} --predict text --json"))
        Path("x.json").write_text(json.dumps(found))              # sentences instead of text
        again = json.loads(self.output(f"--run {run} --predict x.json --json"))
        self.assertEqual([[text[a:b] for a, b in row] for row in found.pop("offsets")],
                         found["sentences"])
        self.assertEqual(again, found)
        self.assertLessEqual({"ner", "emd", "relations", "clusters"}, found.keys())
        Path(run, "model.pt").write_bytes(b"no weights")          # these predict
        self.refused(f"--run {run} --predict text", "model.pt: expected a file of train.py")
        with self.assertRaisesRegex(InputError, "a new folder .*train.resume"):
            tiny_trainer(("ner",), run).train(1)

    def test_the_command_after_an_interruption_goes_on(self):
        self.write_news(4)
        Path("f 1.py").write_text(FeaturesTest.FILE)
        for run, features in [("'a b'", ""), ("c", " --features 'f 1.py'")]:
            again = f"--run {run} --resume{features}"
            new = f"--tasks ner --data news --encoder 1x8 --epochs 1{features} --run {run}"
            with mock.patch("train.MultiTaskTrainer.train_epoch", side_effect=KeyboardInterrupt):
                for line in (new, f"{again} --epochs 2"):
                    self.refused(line, f"go on with: python train.py {again}$")
            self.assertIn("\nepoch   2 ", self.output(again))
        with mock.patch("train.load_tasks", side_effect=KeyboardInterrupt):     # no run as yet
            self.refused("--tasks ner --run d", "d: expected a run, found none")

    def test_bad_commands_and_settings_are_one_line(self):
        Path("strange.txt").write_text("zzz 1 2\n")
        for line, part in [("--tasks foo", "invalid choice: 'foo'"), ("--data nowhere", "nowhere"),
                           ("--resume", "--run"), ("--predict x", "--run"), ("--json", "--predict"),
                           ('--run ""', "--run: expected a folder"), ("--nonsense", "--nonsense"),
                           ("--run r --predict x --dropout 0", "--device"),
                           ("--run r --predict x --threads 0", "--threads: expected a number"),
                           ("--encoder 1x100000", "sizes such as 2x64"), ("--epochs x", "epochs"),
                           ("--encoder pos=1x8", "--encoder: expected one of the tasks ner, emd"),
                           ("--run r --resume --predict x", "--resume: expected no --predict"),
                           ("--tasks ner --data x y", "--data: expected one value for all tasks"),
                           ("--run nothing --resume", "nothing/checkpoint.pt: expected a file"),
                           ("--vectors strange.txt", "words of the training documents")]:
            self.refused(line, re.escape(part))
        self.assertFalse(Path("runs").exists())
        lacking = NotImplementedError("not currently implemented for the MPS device")
        for error in (RuntimeError("[enforce fail] can't allocate memory: 9 bytes"), lacking,
                      RuntimeError("CUDA out of memory."), torch.OutOfMemoryError("9 bytes")):
            with mock.patch("train.main", side_effect=error):
                self.assertEqual(self.call(""), (2, "", f"train.py: {error}\n"))
        with mock.patch("train.main", side_effect=RuntimeError("a fault")), \
                self.assertRaisesRegex(RuntimeError, "a fault"):
            self.call("")
        for change in (dict(sharing="flt"), dict(tasks=("ner", "foo")),
                       dict(data="folder"), dict(dropout="0.4"),
                       dict(encoder="1x64"), dict(encoder=()),
                       dict(encoder=("1x8", "rel=0x8")), dict(encoder=("ner=1x8",)),
                       dict(encoder=("1x8", "2x8")), dict(epochs=2.5), dict(seed=None),
                       dict(dropout=1.0), dict(lr=0), dict(unknown=-0.1), dict(clip=math.nan)):
            with self.subTest(change), self.assertRaisesRegex(InputError, r"--[\w-]+: expected"):
                train.build(Settings(**change))

    def test_the_fifth_task_of_the_readme(self):
        self.write_news(20)
        for path in Path("news").iterdir():          # a word's class is seen from its letters
            documents = [s for d in tasks.read_json(path, ["ner"]) for s in sentences_of(d)]
            for d in documents:
                d.annotations["pos"] = [[(t, t, "WORD" if w.islower() else "NAME" if w.isalpha()
                                          else "MARK") for t, w in enumerate(d.sentences[0])]]
            path.write_text("\n".join(map(tasks.to_json, documents)))
        code = self.readme_code("class PosHead"), "pos.py"
        self.assertEqual(self.call("--tasks pos ner --epochs 5 --run r --encoder 1x16 --lr 0.01 "
                                   "--batch-size 8 --data news", *code)[::2], (0, ""))
        scores = self.results("r")["pos"]["own_best"]["test"]
        self.assertGreater(scores["f1"], 90.0)
        self.assertAlmostEqual(scores["f1"], scores["f1-recall"])          # it is the accuracy
        self.assertIn(" NAME", self.call("--run r --predict news/test.jsonl", *code)[1])
        self.refused("--run r --predict x", "r: expected the script that defines its tasks pos ner")
        self.assertRegex(self.call("--tasks pos --run s", *code)[2], "^pos.py: .* a folder.*\n$")
        # Without --tasks, it trains the tasks that the data carries.
        self.call("--epochs 1 --run t --encoder 1x8 --data news", *code)
        self.assertEqual([*self.results("t")], ["pos", "ner"])
        Path("names").mkdir()
        Path("names/train.conll").write_text("Ada B-PER\n")
        settings = Settings(data=("names", "rel=news"))
        self.assertEqual(train.chosen_tasks(settings), ("ner", "rel"))
        Path("names/train.conll").rename("names/train.json")
        Path("names/train.json").write_text('{"sentences": [["a"]], "entities": [[]]}\n')
        self.refused("--data names", "names: expected training documents with the key of a task")
        self.refused("--data ner=news reel=news", "--data: expected one of .* found reel")

    def test_conll04_as_the_readme_converts_it(self):
        names = {}
        exec(self.readme_code("def convert("), names)
        row = {"tokens": ["Ada", "Kell", "left", "Nordex"], "orig_id": 7, "entities": [
            {"type": "Peop", "start": 0, "end": 2}, {"type": "Org", "start": 3, "end": 4}],
            "relations": [{"type": "Work_For", "head": 0, "tail": 1}]}
        Path("x.json").write_text(json.dumps(names["convert"](row)))
        document, = tasks.read_json("x.json")
        self.assertEqual(document, Document("7", [row["tokens"]], {
            "ner": [[(0, 1, "Peop"), (3, 3, "Org")]], "relations": [[(0, 1, 3, 3, "Work_For")]]}))

    def test_own_code_of_the_readme(self):
        def small(settings, *rest, build=train.build):
            settings.encoder = ("1x8",)
            return build(settings, *rest)
        code = re.sub(r"\.train\(.*?\)", ".train(1)", self.readme_code("train.build("))
        with mock.patch("train.build", small), mock.patch(
                "tasks.builtin_documents", lambda n, *rest: builtin_documents(n // 5, *rest)):
            names = {}
            self.assertRegex(printed(exec, code, names), r"\n1 \d+\.\d+ 0.0\n")   # the curve
        self.assertEqual(len(names["found"].annotations["ner"]), 1)
        self.assertEqual(names["logits"].shape[:2], (7, 7))

    def test_bert_of_the_readme_gives_each_word_the_mean_of_its_pieces(self):
        Path("bert.py").write_text(self.readme_code("def features"))
        states, package = torch.randn(13, 2, 5, 3), mock.MagicMock()     # of <s> x </s> _ _, and
        pieces = package.AutoTokenizer.from_pretrained.return_value.return_value # <s> A da is </s>
        pieces.word_ids.side_effect = [[None, 0, None, None, None], [None, 0, 0, 1, None]]
        encoder = package.AutoModel.from_pretrained.return_value.eval.return_value
        encoder.return_value.hidden_states = [*states]
        with mock.patch.dict(sys.modules, transformers=package):
            layers = tasks.ContextualVectors("bert.py")([["Ada", "is"], ["x"]])
        expected = torch.stack([states[:, 1, 1:3].mean(1), states[:, 1, 3], states[:, 0, 1]], 1)
        for layer in layers.float():
            self.assertLess(min((layer - x).abs().max() for x in expected), 1e-2)

    def test_the_oldest_python_of_the_readme_can_read_the_code(self):
        self.assertIn("Python 3.10 or newer", (HERE / "README.md").read_text())
        for module in (tasks, hmtl, train):
            ast.parse(Path(module.__file__).read_text(), feature_version=(3, 10))

    def test_help_names_every_setting_and_every_command_of_the_readme_parses(self):
        out = self.call("--help")[1]
        self.assertLessEqual(len(out.splitlines()), 100)
        self.assertLessEqual({*map(train.flag_of, asdict(Settings()))},
                             {*re.findall(r"^  (--[a-z-]+)", out, re.M)})
        text = (HERE / "README.md").read_text().replace("\\\n", " ")
        for name, value in re.findall(r'^(\w)="(.*?)"', text, re.M):
            text = text.replace(f"${name}", value)
        text = re.sub(r"^for (\w+) in (\w+).*; do (.*); done",      # the first round of a loop
                      lambda loop: loop[3].replace(f"${loop[1]}", loop[2]), text, flags=re.M)
        lines = re.findall(r"^(?!.*(?:`|--help)).*\btrain\.py (.*?)(?:  #.*)?$", text, re.M)
        lines += re.findall(r"`python train\.py ((?!--help)[^`]*)`", text)
        self.assertGreater(len(lines), 4)
        for line in lines:
            line = line.split("&&")[0].split("|")[0]
            Settings(**train.parse(shlex.split(line))[0])

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
    chosen = choose_tasks(ALL)
    for task in chosen:
        task.data = {"train": documents if task.whole_documents else sentences}
    return chosen, [Document("all", [words, words])]

def benchmark(rounds=6):
    """Prints what a training step costs, as a multiple of the bare encoders of its task."""
    from statistics import median
    from time import process_time as clock           # CPU time: other programs do not count

    # After some training nearly all gold mentions are among the 0.4 spans a token that are kept.
    # The untrained scorer here keeps few of them, so that they come on top of 0.3.
    settings = Settings(encoder=("ner=2x64", "emd=2x64", "rel=3x64", "coref=1x200"), dropout=0.4,
                        batch_size=32, lr_patience=8, spans_per_token=0.3)
    chosen, everything = benchmark_tasks(np.random.default_rng(0))
    vocabulary = Vocabulary.from_documents(everything)
    labels = {task.name: task.labels() for task in chosen}
    torch.manual_seed(0)
    model = HMTL(chosen, labels, vocabulary, settings)
    trainer = train.MultiTaskTrainer(model, chosen, vocabulary, settings, "unused")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, "
          f"{len(vocabulary.words)} words; CPU time, medians of {rounds} x 10 batches")
    print("task   step ms   tokens/s   batch building   step / bare encoders")
    for task in chosen:
        path = [task.name]
        while model.below[path[-1]]:
            path += model.below[path[-1]]
        encoders = [model.encoders[name] for name in path]
        bare = [nn.LSTM(e.forwards[0].input_size, e.width // 2, len(e.forwards),
                        batch_first=True, bidirectional=True) for e in encoders]
        rows = []
        batches = task.batches(settings.batch_size, 0)
        for n in range(10 * rounds):
            documents = next(batches)
            started = clock()
            batch = make_batch(documents, vocabulary)
            building = clock() - started
            inputs = [torch.randn(*batch.mask.shape, lstm.input_size, requires_grad=True)
                      for lstm in bare]
            started = clock()
            for lstm, x in zip(bare, inputs):
                lstm(x)[0].sum().backward()
            plain = clock() - started
            model.train()
            trainer.batches[task.name] = iter([documents])
            started = clock()
            trainer.train_step(task)
            step = clock() - started
            if n >= 10:                               # the first round warms up
                rows.append((step, sum(batch.lengths) / step, building / step,
                             (step - building) / plain))
        step, speed, building, ratio = (median(column) for column in zip(*rows))
        print(f"{task.name:5s} {1000 * step:8.1f} {speed:10.0f} {building:15.1%} {ratio:10.2f}",
              flush=True)

if __name__ == "__main__":
    if sys.argv[1:] == ["benchmark"]:
        benchmark()
    else:
        unittest.main()
