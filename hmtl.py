r"""The model: shared layers below, one head per task above. Read tasks.py before, train.py after.

    word vectors, char CNN -> BiLSTM ner -> BiLSTM emd -> BiLSTM rel     (an encoder each,
                                |             |     \         |          a head each)
                             CRF tags      CRF tags  \    pair scores
                                                      -> BiLSTM coref -> antecedent scores

HMTL (Sanh, Wolf & Ruder, AAAI 2019, "the paper") puts the simple tasks at the bottom and the
complex ones at the top; every encoder reads the word vectors and the encoder below it.

Left out for the reader's sake, and found below the banner: what differs from the paper and why,
other ways to share, the table of word vectors, initial weights, candidate spans, Viterbi.

Shape letters: B sentences, T tokens of the longest, N tokens of all, U distinct words, C their
characters, L layers and F width of contextual vectors, E width of the embedder, D width of an
encoder, H hidden units of a head, K tags, R relation labels, W longest span, S kept spans, G width
of a span's representation, A antecedents. (In formulas U, V, W, A, P, Q are matrices.)
"""

import re
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tasks import (COREF_SCORES, ContextualVectors, Document, Scores, by_length, confusions,
                   count_rows, make_batch, may_follow, shifted, spans_of, tags_of)

@dataclass
class Settings:
    """All settings of a run. Each field is a flag of train.py; its comment is the flag's help."""
    tasks: tuple = ("ner", "emd", "rel", "coref")      # which tasks to train
    data: tuple = ()                   # DIR for all tasks, or TASK=DIR ...; none: built-in corpus
    vectors: str = ""                  # file of word vectors, GloVe or word2vec text
    # model
    word_dim: int = 100                # width of word vectors, where there is no file of them
    char_dim: int = 16                 # width of character vectors
    char_filters: int = 64             # filters of the char CNN, each over three characters
    contextual_dim: int = 200          # width to which --features are projected; 0: they are not
    encoder: str = "1x200"             # BiLSTM of every task: layers x units per direction
    ner_encoder: str = ""              # the BiLSTM of ner, if not --encoder
    emd_encoder: str = ""              # that of emd, likewise
    rel_encoder: str = ""              # that of rel, likewise
    coref_encoder: str = ""            # that of coref, likewise
    dropout: float = 0.5               # on the embedder, every LSTM layer and span representations
    rare: int = 1                      # a word in at most this many training documents is rare
    unknown: float = 0.5               # probability that a rare word is made unknown in training
    relation_units: int = 128          # hidden units of the relation head
    coref_units: int = 150             # hidden units of coreference's scorers, width of its P
    max_span: int = 8                  # tokens in a coreference span
    spans_per_token: float = 0.4       # kept coreference spans per token
    antecedents: int = 70              # nearest kept spans that are scored
    max_tokens: int = 4000             # longer training documents of coreference are cut
    sharing: str = "hierarchical"      # what encoders and heads read: `other_layout` in hmtl.py
    # training
    batch_size: int = 16               # sentences in a batch; coreference takes one document
    lr: float = 2e-3                   # learning rate of every task's Adam
    clip: float = 5.0                  # largest gradient norm
    schedule: str = "proportional"     # which task next: see `plan_epoch` in train.py
    successive_delta: float = 1e-2     # penalty on the drift of shared weights, if successive
    epochs: int = 40                   # an epoch: as many steps as there are batches in all
    patience: int = 20                 # training ends when no task improved in this many epochs
    lr_patience: int = 4               # after more epochs without a best, a task's rate is halved
    seed: int = 0                      # everything random in training follows from it
    threads: int = 1                   # of the CPU; more than 1 is far slower beside a busy program
    device: str = ""                   # such as cpu or cuda:1; none: a GPU where there is one

# ---------------------------------------------------------------------------------- the hierarchy

# task -> the tasks below it, nearest first; the first of them in the run feeds its encoder
HIERARCHY = {"ner": [], "emd": ["ner"], "rel": ["emd", "ner"], "coref": ["emd", "ner"]}

def layout(sharing, tasks):
    """Which encoders feed each encoder, and which each head reads: two dicts {task: [tasks]}, the
    first in the order in which the encoders run. In the paper, a head reads its task's encoder."""
    tree = {task: [t for t in HIERARCHY[task] if t in tasks][:1] for task in tasks}
    if sharing == "hierarchical":
        return tree, {task: [task] for task in tasks}
    return other_layout(sharing, tasks, tree)

# --------------------------------------------------------------------------------- shared layers

def dropout(x, rate, training, mask=1.0):
    """F.dropout(x, rate) * mask, the rate in whole 256ths: `random_bytes` are drawn faster."""
    if not training:
        return x * mask
    limit = int(256 * rate)
    kept = random_bytes(x.shape, x.device) >= limit
    scale = 256 / (256 - limit)
    return x * (kept * (mask * scale))

class LayerMixture(nn.Module):
    """What ELMo does with the layers h_l of a frozen contextual encoder (Peters et al. 2018,
    section 3): gamma sum_l softmax(w)_l h_l; here projected to the width `projected`, if not 0."""

    def __init__(self, n_layers, width, projected):
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(n_layers))
        self.gamma = nn.Parameter(torch.ones(()))
        self.width = projected or width
        self.project = nn.Linear(width, projected, bias=False) if projected else nn.Identity()
        if projected:
            nn.init.xavier_uniform_(self.project.weight)

    def forward(self, layers):
        """(L, N, F) -> (N, self.width)."""
        mixed = torch.tensordot(self.gamma * self.weights.softmax(0), layers.float(), 1)
        return self.project(mixed)

class Embedder(nn.Module):
    """[word vector; char CNN] of every token, and with --features its mixed contextual vectors."""

    def __init__(self, vocabulary, settings, vectors=None):
        super().__init__()
        self.words = WordVectors(vocabulary, settings, vectors)
        self.chars = nn.Embedding(len(vocabulary.chars), settings.char_dim, padding_idx=0)
        nn.init.zeros_(self.chars.weight.data[1])       # unknown ones: not in training documents
        self.filters = nn.Linear(3 * settings.char_dim, settings.char_filters)
        self.rate = settings.dropout
        n_layers, width = vocabulary.contextual.shape
        self.mixture = LayerMixture(n_layers, width, settings.contextual_dim) if n_layers else None
        self.word_width = settings.word_dim + settings.char_filters
        self.width = self.word_width + (self.mixture.width if self.mixture else 0)

    def forward(self, batch):
        """Batch -> (B, T, E), zero on padding."""
        of_words = dropout(self.word_features(batch), self.rate, self.training)
        x = F.embedding(batch.tokens, of_words)       # its word's features, (B, T, word_width)
        if self.mixture:
            mixed = dropout(self.mixture(batch.contextual), self.rate, self.training)
            contextual = x.new_zeros(*batch.mask.shape, self.mixture.width)
            contextual[batch.mask] = mixed                                    # (N, width)
            x = torch.cat([x, contextual], 2)
        return x

    def word_features(self, batch):
        """[word vector; char CNN] of the distinct words, (U, word_width)."""
        return torch.cat([self.words(batch.words), self.char_features(batch)], 1)

    def char_features(self, batch):
        """Max over a word's characters c_t of relu(Q [c_t-1; c_t; c_t+1] + b), (U, filters). Words
        lie in one row with a 0 between them: a padded convolution takes 1.5 to 2 times as long."""
        windows = batch.chars.unfold(0, 3, 1)                                 # (C + U - 1, 3)
        windows = windows[batch.chars[1:-1] > 0]                              # (C, 3)
        features = self.filters(self.chars(windows).flatten(1))               # (C, filters)
        # A maximum that starts from 0 is a ReLU.
        return torch.segment_reduce(features, "max", lengths=batch.n_chars, initial=0.0)

class Encoder(nn.Module):
    """A stack of bidirectional LSTM layers, exact on padded input.

    A plain padded BiLSTM is wrong: its backward half starts in the padding. Packed sequences take
    1.7 to 2.5 times as long. Here two LSTMs read forward, one of them every sentence turned around
    within its own length, so both meet the padding last, where nothing depends on it.
    """

    def __init__(self, input_width, shape, rate):
        super().__init__()
        n_layers, units = map(int, shape.split("x"))              # such as 2x64, per direction
        self.rate = rate                                          # of dropout
        self.width = 2 * units                                    # of the output
        widths = [input_width] + [self.width] * (n_layers - 1)
        self.forwards = nn.ModuleList(new_lstm(w, units) for w in widths)
        self.backwards = nn.ModuleList(new_lstm(w, units) for w in widths)

    def forward(self, x, mask):
        """(B, T, input_width), (B, T) -> (B, T, D), zero on padding."""
        turned = turned_around(mask)      # (B, T): each token's mirror image, a row in (B * T, ...)
        for forwards, backwards in zip(self.forwards, self.backwards):
            ahead, _ = forwards(x)                                               # (B, T, D / 2)
            back, _ = backwards(F.embedding(turned, x.flatten(0, 1)))   # faster than indexing
            back = F.embedding(turned, back.flatten(0, 1))
            x = torch.cat([ahead, back], 2)
            x = dropout(x, self.rate, self.training, mask=mask[:, :, None])
        return x

# ----------------------------------------------------------------------------------------- heads

class Head(nn.Module):
    """What a task adds to the shared layers. Subclasses are built as (task, labels, width of x,
    width of embedded, settings) and have two methods of their own:

    loss(x, embedded, batch)    training loss, a scalar
    decode(x, embedded, batch)  predictions, a list with the rows of every document

    x (B, T, D) is the output of the task's encoder; embedded (B, T, E) is that of the embedder,
    which only coreference reads.
    """
    scores = {"f1": count_rows}       # for `count`: name -> function of (predicted, gold rows)
    mean = None                       # name of their mean, if that is a score too

    def __init__(self, task, labels):
        super().__init__()
        self.task = task
        self.labels = labels
        self.label_ids = {label: i for i, label in enumerate(labels)}

    def gold(self, batch):
        """Of every document the gold clusters, or the gold rows of its one sentence."""
        rows = [document.annotations[self.task.annotation] for document in batch.documents]
        return rows if self.task.whole_documents else [sentences[0] for sentences in rows]

    def count(self, predictions, batch):
        """Yields {score: four numbers of `Scores`} of every document. predictions: {task: rows}."""
        for predicted, gold in zip(predictions[self.task.name], self.gold(batch)):
            yield {name: score(predicted, gold) for name, score in self.scores.items()}

    def target(self, rows):
        """Gold rows in the form of decoded ones."""
        return rows

# ------------------------------------------------------------------------- ner and emd: a tagger

class CRF(nn.Module):
    """Linear-chain conditional random field over K tags (Lafferty et al. 2001).

    score(e, y) = start(y_1) + sum_t e_t(y_t) + sum_t A(y_t-1, y_t) + end(y_n)
    loss(e, y)  = log Z(e) - score(e, y), where Z sums exp(score) over all tag sequences

    e_t(k), the emission, is how well tag k suits token t; start, A (transitions), end are learned.
    """

    def __init__(self, allowed):
        """allowed: (K + 1, K + 1) bool, [i, j] whether tag j may follow i; K is start and end."""
        super().__init__()
        n_tags = len(allowed) - 1
        self.transitions = nn.Parameter(torch.zeros(n_tags, n_tags))
        self.start = nn.Parameter(torch.zeros(n_tags))
        self.end = nn.Parameter(torch.zeros(n_tags))
        forbidden = torch.zeros(allowed.shape).masked_fill(~allowed, float("-inf"))
        self.register_buffer("forbidden", forbidden, persistent=False)   # in decode alone

    def loss(self, emissions, tags, mask):
        """(B, T, K), (B, T), (B, T) -> (B,)."""
        return self.log_partition(emissions, mask) - self.score(emissions, tags, mask)

    def score(self, emissions, tags, mask):
        emitted = emissions.gather(2, tags[:, :, None])[:, :, 0]                 # (B, T)
        moved = self.transitions[tags[:, :-1], tags[:, 1:]]                      # (B, T - 1)
        last_tag = tags.gather(1, mask.sum(1, keepdim=True) - 1)[:, 0]           # (B,)
        inner = (emitted * mask).sum(1) + (moved * mask[:, 1:]).sum(1)
        return self.start[tags[:, 0]] + inner + self.end[last_tag]

    def log_partition(self, emissions, mask):
        """log Z, (B,), by the forward recursion

            a_1(j) = start(j) + e_1(j)
            a_t(j) = e_t(j) + log sum_i exp(a_t-1(i)) exp(A(i, j))
            log Z  = log sum_j exp(a_n(j) + end(j)).

        The sum over i is a matrix product: with 18 labels a fifth of the time of a logsumexp over
        (B, K, K). Each row's largest a is taken out before exp and added again.
        """
        transitions = self.transitions.exp()
        a = self.start + emissions[:, 0]                                         # (B, K)
        steps = [a]
        for emitted in emissions.unbind(1)[1:]:
            top = a.detach().amax(1, keepdim=True)              # cancels: it needs no gradient
            a = ((a - top).exp() @ transitions).log() + top + emitted
            steps.append(a)
        # Every sentence ends at its own last token.
        last = mask.sum(1) - 1
        final = torch.stack(steps)[last, torch.arange(len(last))]                # (B, K)
        return (final + self.end).logsumexp(1)

    @torch.no_grad()
    def decode(self, emissions, mask):
        """The best of all allowed tag sequences, (B, T); arbitrary past the end of a sentence."""
        return viterbi(emissions, mask, self.start + self.forbidden[-1, :-1],
                       self.transitions + self.forbidden[:-1, :-1],
                       self.end + self.forbidden[:-1, -1])

class Tagger(Head):
    """Spans with labels, as BIOUL tags: begin, inside, outside, unit (one word), last."""

    def __init__(self, task, labels, width, embedded_width, settings):
        super().__init__(task, labels)
        self.tags = ["O"] + [f"{prefix}-{label}" for label in labels for prefix in "BIUL"]
        self.tag_ids = {tag: i for i, tag in enumerate(self.tags)}
        self.emit = nn.Linear(width, len(self.tags))
        around = [*self.tags, "O"]                                # start and end act as O
        self.crf = CRF(torch.tensor([[may_follow(a, b) for b in around] for a in around]))

    def loss(self, x, embedded, batch):
        tags = torch.zeros(batch.tokens.shape, dtype=torch.long)                 # (B, T)
        for row, spans, length in zip(tags, self.gold(batch), batch.lengths):
            row[:length] = torch.tensor([self.tag_ids[tag] for tag in tags_of(spans, length)])
        return self.crf.loss(self.emit(x), tags.to(x.device), batch.mask).mean()

    def decode(self, x, embedded, batch):
        """[(start, end, label)] for every sentence."""
        ids = self.crf.decode(self.emit(x), batch.mask).tolist()
        tags = [[self.tags[i] for i in row] for row in ids]
        return [spans_of(row[:length]) for row, length in zip(tags, batch.lengths)]

# ------------------------------------------------------------------------------------ rel: pairs

class RelationHead(Head):
    """Multi-head selection (Bekoulis et al. 2018). For every pair of tokens i, j and all labels

        P(i, j) = sigmoid(V relu(U x_i + W x_j + b) + c),

    where i and j are the last tokens of the arguments, and U, W, V are first, second, label.
    """

    def __init__(self, task, labels, width, embedded_width, settings):
        super().__init__(task, labels)
        self.first = nn.Linear(width, settings.relation_units)
        self.second = nn.Linear(width, settings.relation_units, bias=False)
        self.label = nn.Linear(settings.relation_units, len(labels))
        for layer in (self.first, self.second, self.label):
            nn.init.xavier_uniform_(layer.weight)
        # One or two in a thousand (pair, label) are true: from 0, many steps only learn this.
        nn.init.constant_(self.label.bias, -7.0)

    def logits(self, x, batch):
        """(t, t, R) of each sentence, t its length: padded pairs take 3.5 times as long."""
        first = self.first(x)[batch.mask].split(batch.lengths)               # B times (t, H)
        second = self.second(x)[batch.mask].split(batch.lengths)
        weight, bias = self.label_vectors()
        return [F.linear(F.relu(u[:, None] + w), weight, bias) for u, w in zip(first, second)]

    def label_vectors(self):
        """V, (R, H), and c, (R,): a method, so that another head can make them of words."""
        return self.label.weight, self.label.bias

    def loss(self, x, embedded, batch):
        """Binary cross-entropy, summed over pairs and labels, averaged over sentences."""
        loss = 0.0
        for logits, relations in zip(self.logits(x, batch), self.gold(batch)):
            true = torch.zeros(logits.shape)                                     # (t, t, R)
            for i, j, label in self.target(relations):
                true[i, j, self.label_ids[label]] = 1.0
            loss += F.binary_cross_entropy_with_logits(logits, true.to(x.device), reduction="sum")
        return loss / len(batch.documents)

    def decode(self, x, embedded, batch):
        """[(i, j, label)] for every sentence: the pairs of last tokens with probability > 1/2."""
        found = [(logits > 0).nonzero().tolist() for logits in self.logits(x, batch)]
        return [[(i, j, self.labels[r]) for i, j, r in rows] for rows in found]

    def count(self, predictions, batch):
        return count_relations(predictions, batch, self.gold(batch))     # below the banner

    def target(self, rows):
        return [(i, j, label) for _, i, _, j, label in rows]

# --------------------------------------------------------------------------- coref: antecedents

class FFNN(nn.Module):
    """FFNN([a; b; ...]) of Lee et al. 2017: two hidden layers and a score. The first is split into
    parts, W [a; b] = W_a a + W_b b: the caller applies each once per token or span and adds them up
    per span or pair; `forward` does the rest."""

    def __init__(self, widths, units):
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(n, units, bias=i == 0) for i, n in enumerate(widths))
        self.upper = nn.Sequential(nn.ReLU(), nn.Linear(units, units),
                                   nn.ReLU(), nn.Linear(units, 1))

    def forward(self, summed):
        """The sum of the parts' outputs, (..., H) -> (...)."""
        return self.upper(summed)[..., 0]

class CorefHead(Head):
    """End-to-end coreference (Lee et al. 2017), on one document.

    Every span of up to W words gets a mention score; the best are kept; each kept span picks an
    antecedent among the A kept spans before it, or none.

        g_i       = [x_first; x_last; e^; phi_w]
        s_m(i)    = FFNN(g_i)
        s_a(i, j) = FFNN([g_i; g_j; P g_i o P g_j; phi_d])
        s(i, j)   = s_m(i) + s_m(j) + s_a(i, j)           s(i, none) = 0

    e^ is the mean of the span's embedded tokens, weighted by an attention that reads x; phi_w and
    phi_d are learned vectors of its width and of the distance, P a projection, o the elementwise
    product.
    """
    scores = COREF_SCORES
    mean = "mean"
    BUCKETS = [2, 3, 4, 5, 8, 16, 32, 64]                 # where a new distance feature begins

    def __init__(self, task, labels, width, embedded_width, settings):
        super().__init__(task, labels)
        units = settings.coref_units
        phi = 20                                          # width of the feature vectors
        self.settings = settings
        self.attention = nn.Sequential(nn.Linear(width, units), nn.ReLU(), nn.Linear(units, 1))
        self.span_width = nn.Embedding(settings.max_span, phi)
        self.distance = nn.Embedding(len(self.BUCKETS) + 1, phi)
        self.mention = FFNN([width, width, embedded_width, phi], units)
        g = 2 * width + embedded_width + phi
        self.narrow = nn.Linear(g, units)                 # P: a pair's product then costs a quarter
        self.pair = FFNN([g, g, units, phi], units)

    def loss(self, x, embedded, batch):
        """- sum over kept spans i of log P(i picks one of its correct antecedents)."""
        gold = gold_clusters(batch, self.gold(batch)[0], self.settings.max_span)  # (N, W)
        first, last, mention_scores, g = self.keep_spans(x, embedded, batch, gold)
        scores = self.antecedent_scores(mention_scores, g)               # (S, min(A, S) + 1)
        # Column d is the span d places back, column 0 no antecedent. Correct: all antecedents of
        # the span's gold cluster; without one, column 0.
        cluster = gold[first, last - first]                                      # (S,)
        correct = torch.zeros_like(scores, dtype=torch.bool)
        for d in range(1, scores.shape[1]):
            correct[d:, d] = (cluster[d:] == cluster[:-d]) & (cluster[d:] > 0)
        correct[:, 0] = ~correct.any(1)
        right = scores.masked_fill(~correct, float("-inf"))
        return (scores.logsumexp(1) - right.logsumexp(1)).sum()

    def decode(self, x, embedded, batch):
        """[clusters of (start, end)], of the one document."""
        first, last, mention_scores, g = self.keep_spans(x, embedded, batch)
        back = self.antecedent_scores(mention_scores, g).argmax(1)               # 0: none
        spans = list(zip(first.tolist(), last.tolist()))
        return [clusters_of(spans, back.tolist())]

    def keep_spans(self, x, embedded, batch, gold=None):
        """Scores all spans and keeps the best (Lee et al. 2017, sections 4 and 5).

        In (N, W), [n, w] is the span of w + 1 words from token n. Returns, of the kept spans in the
        order of the text, the first and last tokens, s_m (all (S,)) and g (S, G).
        """
        x = x[batch.mask]                                                        # (N, D)
        embedded = embedded[batch.mask]                                          # (N, E)
        ends, valid = span_ends(batch, self.settings.max_span)    # (N, W): token n + w
        weights = self.attention_weights(x, ends)                                # (N, W, W)
        of_first, of_last, of_attended, of_width = self.mention.parts
        hidden = of_first(x)[:, None] + of_last(x)[ends]                         # (N, W, H)
        hidden = hidden + weights @ of_attended(embedded)[ends]
        scores = self.mention(hidden + of_width(self.span_width.weight))         # (N, W)
        scores = scores.masked_fill(~valid, float("-inf"))

        # Prune. In training, keep the gold mentions too: otherwise all scores can collapse together
        # until no gold mention survives, and the loss sticks at 0.
        n_kept = max(1, int(self.settings.spans_per_token * len(x)))
        best = scores.flatten().topk(min(n_kept, int(valid.sum()))).indices
        kept = torch.zeros_like(valid)
        kept.view(-1)[best] = True
        if gold is not None:
            kept |= valid & (gold > 0)

        n, w = kept.nonzero().unbind(1)                                          # (S,)
        attended = weights[n, w][:, None] @ embedded[ends[n]]                    # (S, 1, E)
        g = torch.cat([x[n], x[n + w], attended[:, 0], self.span_width(w)], 1)
        g = dropout(g, self.settings.dropout, self.training)
        return n, n + w, scores[n, w], g

    def attention_weights(self, x, ends):
        """(N, W, W): [n, w, k] weighs token n + k in span (n, w), a softmax of learned scores."""
        scores = self.attention(x)[ends, 0]                                      # (N, W)
        step = torch.arange(ends.shape[1], device=x.device)
        outside = step > step[:, None]                                           # (W, W)
        scores = scores[:, None].masked_fill(outside, float("-inf"))             # (N, W, W)
        return scores.softmax(2)

    def antecedent_scores(self, mention_scores, g):
        """s, (S, min(A, S) + 1): column d holds the span d places back, column 0 none. All pairs
        that are d apart are two slices, so nothing needs to be gathered."""
        of_span, of_antecedent, of_product, of_distance = self.pair.parts
        span, antecedent = of_span(g), of_antecedent(g)                          # (S, H)
        distance = of_distance(self.distance.weight)                             # (buckets, H)
        narrow = self.narrow(g)                                                  # (S, H)
        columns = [torch.zeros_like(mention_scores)]
        # d = S (if A >= S) has no pair; it gives every weight a gradient even with a single span.
        for d in range(1, min(self.settings.antecedents, len(g)) + 1):
            bucket = sum(d >= edge for edge in self.BUCKETS)
            hidden = span[d:] + antecedent[:-d] + distance[bucket]               # (S - d, H)
            s = self.pair(hidden + of_product(narrow[d:] * narrow[:-d]))
            s = s + mention_scores[d:] + mention_scores[:-d]
            columns.append(F.pad(s, (d, 0), value=float("-inf")))
        return torch.stack(columns, 1)

# ------------------------------------------------------------------------------------- the model

HEADS = {"ner": Tagger, "emd": Tagger, "rel": RelationHead, "coref": CorefHead}

class HMTL(nn.Module):
    """The hierarchy of encoders, and a head for each chosen task."""

    def __init__(self, tasks, labels, vocabulary, settings, vectors=None):
        """tasks: chosen `Task`s, the lowest first; labels: {task name: list of labels}; vectors:
        the words and array of `read_vectors`, or None."""
        super().__init__()
        self.tasks = {task.name: task for task in tasks}
        self.below, self.reads = layout(settings.sharing, list(self.tasks))
        self.embedder = Embedder(vocabulary, settings, vectors)
        self.encoders = nn.ModuleDict()
        for name, below in self.below.items():
            width = self.embedder.width + sum(self.encoders[t].width for t in below)
            shape = getattr(settings, f"{name}_encoder", "") or settings.encoder
            self.encoders[name] = Encoder(width, shape, settings.dropout)
        heads = HEADS | QUESTION_HEADS if settings.sharing == "question" else HEADS
        self.heads = nn.ModuleDict()
        for name, reads in self.reads.items():
            width = max(self.encoders[t].width for t in reads)    # several if latent: see mixtures
            self.heads[name] = heads[name](self.tasks[name], labels[name], width,
                                           self.embedder.width, settings)
        self.metrics = {name: Scores(head.mean) for name, head in self.heads.items()}
        if settings.sharing == "question":
            share_answers(self, vocabulary, settings)
        self.mixtures = nn.ParameterDict({name: torch.zeros(len(reads))
                                          for name, reads in self.reads.items() if len(reads) > 1})

    def device(self):
        return next(self.parameters()).device

    def encode(self, batch, tasks):
        """The embedder's output (B, T, E), and {task: what its head reads, (B, T, D)}."""
        # Only the encoders that the tasks need, from the top to the bottom ...
        needed = {encoder for task in tasks for encoder in self.reads[task]}
        for name in reversed(self.below):
            if name in needed:
                needed.update(self.below[name])
        # ... run once, from the bottom to the top.
        embedded = self.embedder(batch)
        outputs = {}
        for name, below in self.below.items():
            if name in needed:
                x = torch.cat([embedded, *(outputs[t] for t in below)], 2)
                outputs[name] = run_in_groups(self.encoders[name], x, batch)     # encoder(x, mask)
        # head_input: outputs[task], or what another way to share makes of all outputs.
        return embedded, {task: head_input(self, task, outputs) for task in tasks}

    def forward(self, task_name, batch):
        """{"loss": scalar} in training; else {"predictions": ...}, added to the task's metric."""
        head = self.heads[task_name]
        if self.training:
            embedded, inputs = self.encode(batch, [task_name])
            return {"loss": head.loss(inputs[task_name], embedded, batch)}
        predictions = self.predict(batch, [task_name])
        for counts in head.count(predictions, batch):
            self.metrics[task_name].add(counts)
        self.metrics[task_name].confusions += count_confusions(head, predictions, batch)
        return {"predictions": predictions[task_name]}

    @torch.no_grad()
    def predict(self, batch, tasks=None):
        """{task: predictions} in one pass; with relations, of the tagger of their arguments too."""
        tasks = list(tasks or self.tasks)
        tagger = argument_tagger(self.tasks)
        if "rel" in tasks and tagger and tagger not in tasks:
            tasks.append(tagger)
        embedded, inputs = self.encode(batch, tasks)
        return {task: self.heads[task].decode(inputs[task], embedded, batch) for task in tasks}

    def get_metrics(self, task_name, reset=False):
        """{score name: percent} of everything that `forward` evaluated since the last reset."""
        scores = self.metrics[task_name].compute()
        if reset:
            self.metrics[task_name] = Scores(self.heads[task_name].mean)
        return scores

# ================================================================================================
# Skip this on a first reading: the practical side. Go on with train.py.
# ================================================================================================
# What differs from the paper, and why:
# - ELMo is not here: --features reads the vectors of any frozen encoder in its place.
# - By default all encoders are one wide layer, batches smaller, the learning rate higher: after ten
#   epochs of CoNLL04 (dev) 79 F1 for names and 55 for relations, 62 and 20 with the paper's sizes.
# - For coreference too every sentence of a document is encoded on its own, as in Lee et al. 2017:
#   the lower encoders then see what they see in the other tasks.
# - A sentence's loss is the sum over its tokens or pairs, a batch's the mean over its sentences
#   (coreference: the sum over its document). The authors' code averaged relations over padding.
# - A rare word, one of a single training document, is read as the unknown word half of the time. So
#   the vector of the unknown is trained, and coreference learns to match names by their characters.
# - Relations start from a bias of -7, LSTMs from larger weights than torch gives; a task whose dev
#   score is still 0 loses neither patience nor learning rate (train.py).
# - In training, gold mentions are kept beside the best. Kept spans may cross; Lee et al. drop such.
# - Of two spans the antecedent scorer reads P g_i o P g_j. With g_i o g_j a step takes 1.7 times as
#   long; on SciERC (dev, one seed, --features) F1 is then 50.9 instead of 50.2.
# - Dropout is drawn once for each distinct word (of contextual vectors, for each token), and in
#   coreference on g, which the antecedent scorer reads, not on hidden units: fewer numbers to draw.

def other_layout(sharing, tasks, tree):
    """inverted: the paper's tree upside down; flat, question: one stack of all encoders, every head
    reads its top; latent: the tree, but a head reads a learned mixture of all encoders, after the
    idea of Ruder et al. 2017, "Latent multi-task architecture learning"."""
    if sharing == "inverted":
        above = {task: [t for t in tasks if task in tree[t]] for task in reversed(tasks)}
        return above, {task: [task] for task in tasks}
    if sharing in ("flat", "question"):
        stack = {task: tasks[:i][-1:] for i, task in enumerate(tasks)}
        return stack, {task: tasks[-1:] for task in tasks}
    return tree, {task: tasks for task in tasks}

def head_input(model, task, outputs):
    """The output of the task's encoder; with latent sharing sum_k softmax(w)_k x_k, a mixture of
    the outputs of all encoders, narrow ones padded with zeros."""
    read = [outputs[encoder] for encoder in model.reads[task]]
    if len(read) == 1:
        return read[0]
    width = max(x.shape[2] for x in read)
    return sum(weight * F.pad(x, (0, width - x.shape[2]))
               for weight, x in zip(model.mixtures[task].softmax(0), read))

class QuestionHead(RelationHead):
    """One head for names, mentions and relations, after McCann et al. 2018: every label is a
    question, such as "rel Works For", every answer a pair of tokens. With its embedded words e

        P(i, j, question) = sigmoid(q relu(U x_i + W x_j + b) + c),    [q; c] = Q mean(e) + d.

    All tasks and labels share U, W, b and Q, d: `share_answers` hands them out, as `first`,
    `second` and `reader`, and `asked`, the batch of the questions. A relation's answer is
    two last tokens. Coreference keeps its own head: as two questions, which spans are mentions and
    which two mentions are the same, it came to 57 F1 on the built-in corpus, `flat` to 89.
    """

    def questions(self):
        """The words of every question: the task's name, the label's parts."""
        spaced = [re.sub(r"(?<=[a-z])(?=[A-Z])", " ", label) for label in self.labels]
        parts = [re.findall(r"[^\W\d_]+|\d+", label) or [label] for label in spaced]
        return [[self.task.name, *words] for words in parts]

    def label_vectors(self):
        asked = self.asked.to(self.first.weight.device)
        words = F.embedding(asked.tokens, self.embedder.word_features(asked))    # (1 + R, T, width)
        vectors = self.reader(words.sum(1) / asked.mask.sum(1, keepdim=True))    # (1 + R, H + 1)
        return vectors[1:, :-1], vectors[1:, -1]             # without the first, see share_answers

class SpanQuestions(QuestionHead):
    """Names and mentions: a question's answers are first and last tokens."""
    count = Head.count
    target = Head.target

    def decode(self, x, embedded, batch):
        """Of answers that overlap, the more probable stays."""
        found = [[] for _ in batch.lengths]
        for spans, logits in zip(found, self.logits(x, batch)):
            answers, free = (logits > 0).nonzero(), set(range(len(logits)))
            order = logits[tuple(answers.T)].argsort(descending=True, stable=True)
            for i, j, r in answers[order].tolist():
                if i <= j and free.issuperset(range(i, j + 1)):
                    free -= {*range(i, j + 1)}
                    spans.append((i, j, self.labels[r]))
        return [sorted(spans) for spans in found]

QUESTION_HEADS = {"ner": SpanQuestions, "emd": SpanQuestions, "rel": QuestionHead}

def share_answers(model, vocabulary, settings):
    """Gives all question heads the layers of the first, and their questions."""
    heads = [head for head in model.heads.values() if isinstance(head, QuestionHead)]
    reader = nn.Linear(model.embedder.word_width, settings.relation_units + 1)
    nn.init.constant_(reader.bias[-1:], -7.0)                            # as in `RelationHead`
    for head in heads:
        head.label, head.reader = None, reader
        head.first, head.second = heads[0].first, heads[0].second
        # The name alone comes first, so that the batch is not empty where there are no labels.
        questions = Document("", [[head.task.name], *head.questions()])
        head.asked = make_batch([questions], vocabulary, ContextualVectors())
        vars(head)["embedder"] = model.embedder    # not as a part, whose weights it would hold too

class WordVectors(nn.Module):
    """(U,) -> (U, word_dim); in training, a rare word sometimes gets the vector of the unknown.

    Words that only the vector file has get no gradient: they are a buffer, not a parameter (with
    400,000 a step takes 31 ms less), and are written once, not into every checkpoint.
    """

    def __init__(self, vocabulary, settings, vectors):
        super().__init__()
        n = len(vocabulary.counts)
        table, frozen = torch.randn(n, settings.word_dim) * 0.1, torch.zeros(0, settings.word_dim)
        table[0] = 0.0                                                           # padding
        if vectors:
            words, values = vectors[0], torch.as_tensor(vectors[1])
            ids = torch.tensor([vocabulary.word_ids[word] for word in words], dtype=torch.long)
            table[ids[ids < n]] = values[ids < n]
            frozen = values[ids >= n]                       # in the order of the vocabulary
        self.trained = nn.Embedding.from_pretrained(table, freeze=False, padding_idx=0)
        self.register_buffer("frozen", frozen, persistent=False)
        rare = torch.tensor(vocabulary.counts) <= settings.rare
        unknown = F.pad(settings.unknown * rare, (0, len(frozen)))                # 0 for frozen
        self.register_buffer("unknown", unknown, persistent=False)

    def forward(self, ids):
        n = self.trained.num_embeddings
        if self.training:
            probability = self.unknown[ids]
            ids = torch.where(torch.rand_like(probability) < probability, 1, ids)
        vectors = self.trained(ids.clamp(max=n - 1))
        if len(self.frozen):
            vectors = torch.where((ids < n)[:, None], vectors, self.frozen[(ids - n).clamp(min=0)])
        return vectors

def random_bytes(shape, device):
    """Eight bytes of each 64-bit random number: dropout then takes a third of F.dropout's time."""
    n = torch.Size(shape).numel()
    numbers = torch.randint(-2 ** 63, 2 ** 63 - 1, (n // 8 + 1,), device=device)
    return numbers.view(torch.uint8)[:n].view(shape)

@torch.no_grad()
def new_lstm(width, units):
    """torch starts all weights and biases within +-1 / sqrt(units): three layers later, tokens are
    0.01 apart, and relations learn nothing for hundreds of steps. With Glorot & Bengio 2010 for the
    input, orthogonal weights for the state and an open forget gate (Jozefowicz et al. 2015), they
    are 0.1 apart."""
    lstm = nn.LSTM(width, units, batch_first=True)
    for of_input, of_state in zip(lstm.weight_ih_l0.chunk(4), lstm.weight_hh_l0.chunk(4)):
        nn.init.xavier_uniform_(of_input)
        nn.init.orthogonal_(of_state)
    gates = torch.tensor([0.0, 1.0, 0.0, 0.0])                   # input, forget, cell, output
    lstm.bias_ih_l0.copy_(gates.repeat_interleave(units))
    nn.init.zeros_(lstm.bias_hh_l0)
    return lstm

def turned_around(mask):
    """(B, T): for every token, the row in (B * T, ...) of its mirror image in the sentence; for
    padding, its own. (A bidirectional LSTM without biases would keep its state at zero in the
    padding, but the gradient of its backward half was seen to overflow in 100 steps of it.)"""
    step = torch.arange(mask.shape[1], device=mask.device)
    row = torch.arange(len(mask), device=mask.device)[:, None] * mask.shape[1]
    return row + torch.where(mask, mask.sum(1, keepdim=True) - 1 - step, step)

def run_in_groups(encoder, x, batch, size=8):
    """The encoder on sentences of like lengths together, if more than a third of a batch is
    padding, as in a document. One of 2,000 tokens then takes about half the time."""
    if batch.mask.numel() <= 1.5 * sum(batch.lengths):
        return encoder(x, batch.mask)
    output = x.new_zeros(*batch.mask.shape, encoder.width)
    for rows in by_length(batch.lengths, size):
        longest = batch.lengths[rows[-1]]
        output[rows, :longest] = encoder(x[rows, :longest], batch.mask[rows, :longest])
    return output

def viterbi(emissions, mask, start, transitions, end):
    """b_t(j) = e_t(j) + max_i (b_t-1(i) + A(i, j)). Only the maxima go forward; the arg max is
    taken on the way back, along the best path alone, in numpy: small operations cost less there."""
    best = [start + emissions[:, 0]]
    for emitted in emissions.unbind(1)[1:]:
        best.append((best[-1][:, :, None] + transitions).amax(1) + emitted)      # (B, K)
    best = torch.stack(best).cpu().numpy()                                       # (T, B, K)
    last = (mask.sum(1) - 1).cpu().numpy()
    end, onward = end.cpu().numpy(), transitions.T.cpu().numpy()
    tag, tags = np.zeros(len(last), dtype=int), []
    for t in reversed(range(len(best))):
        scores = best[t] + np.where((last == t)[:, None], end, onward[tag])      # (B, K)
        tag = scores.argmax(1)
        tags.append(tag)
    return torch.from_numpy(np.stack(tags[::-1], 1))

def count_confusions(head, predictions, batch):
    """Counter of (gold label, predicted label); empty for clusters."""
    if head.task.whole_documents:
        return Counter()
    pairs = zip(predictions[head.task.name], map(head.target, head.gold(batch)))
    return sum((confusions(*pair) for pair in pairs), Counter())

def argument_tagger(tasks):
    """The tagger that gives relations their arguments: mentions before names."""
    return next((name for name in ("emd", "ner") if name in tasks), None)

def with_spans(relations, spans):
    """Relations between last tokens as (start1, end1, start2, end2, label), the arguments being
    the spans that end there; a relation is left out if there is none."""
    start_of = {end: start for start, end, _ in spans}
    return [(start_of[i], i, start_of[j], j, label) for i, j, label in relations
            if i in start_of and j in start_of]

def with_types(relations, spans):
    """Relations with the labels of their arguments' spans."""
    label_of = {(start, end): label for start, end, label in spans}
    return [(*r, label_of.get(r[:2]), label_of.get(r[2:4])) for r in relations]

def count_relations(predictions, batch, gold_relations):
    """`last-token`, the paper's score, asks for the label and both arguments' last tokens. With a
    tagger, `boundaries` asks for their spans, and `strict` for their types too; `strict` needs the
    tagger's annotation."""
    tagger = argument_tagger(predictions)
    for i, gold in enumerate(gold_relations):
        pairs = predictions["rel"][i]
        counts = {"last-token": count_rows(pairs, [(r[1], r[3], r[4]) for r in gold])}
        if tagger:
            spans, annotations = predictions[tagger][i], batch.documents[i].annotations
            found = with_spans(pairs, spans)
            counts["boundaries"] = count_rows(found, gold)
            if tagger in annotations:
                gold = with_types(gold, annotations[tagger][0])
                counts["strict"] = count_rows(with_types(found, spans), gold)
        yield counts

def span_ends(batch, longest):
    """(N, W): the last tokens of all spans, and which spans lie within a sentence."""
    n, device = sum(batch.lengths), batch.mask.device
    ends = torch.arange(n, device=device)[:, None] + torch.arange(longest, device=device)
    sentence = batch.mask.nonzero()[:, 0]                                        # (N,)
    clamped = ends.clamp(max=n - 1)
    return clamped, (ends < n) & (sentence[clamped] == sentence[:, None])

def gold_clusters(batch, clusters, longest):
    """(N, W): for every span the number of its gold cluster, from 1; 0 for none."""
    cluster = torch.zeros(sum(batch.lengths), longest, dtype=torch.long)
    for i, mentions in enumerate(clusters, 1):
        for start, end in mentions:
            if end - start < longest:
                cluster[start, end - start] = i
    return cluster.to(batch.mask.device)

def clusters_of(spans, back):
    """The clusters, from every span's antecedent: `back` spans before it, 0 for none."""
    cluster_of = {}
    for i, d in enumerate(back):
        if d > 0:
            cluster_of[i] = cluster_of.setdefault(i - d, [spans[i - d]])
            cluster_of[i].append(spans[i])
    return [*{id(cluster): cluster for cluster in cluster_of.values()}.values()]

def annotate(model, documents, vocabulary):
    """Yields the documents with everything that the model predicts, and nothing that they had but
    the "offsets" of raw text. With coreference a document is read at once, else its sentences."""
    documents = list(documents)
    whole = [task for task in model.tasks.values() if task.whole_documents]
    by_sentence = [task for task in model.tasks.values() if not task.whole_documents]
    sentences = [words for document in documents for words in document.sentences if words]
    of_sentences = predict_sentences(model, sentences, vocabulary)
    for document in documents:
        rows = {task.annotation: [] for task in model.tasks.values()}
        if whole and len(document):
            predictions = predict_batch(model, [document], vocabulary)
            rows |= {task.annotation: predictions.pop(task.name)[0] for task in whole}
            of_sentences = (dict(zip(predictions, row)) for row in zip(*predictions.values()))
        starts = accumulate(map(len, document.sentences), initial=0)
        for words, start in zip(document.sentences, starts):
            here = next(of_sentences) if words and by_sentence else {}
            for task in by_sentence:
                rows[task.annotation].append([shifted(r, start) for r in here.get(task.name, [])])
        kept = {k: x for k, x in document.annotations.items() if k == "offsets"}
        yield Document(document.key, document.sentences, rows | kept)

def predict_sentences(model, sentences, vocabulary, window=1024, size=32):
    """Yields {task: rows} for every sentence. Of a window, sentences of like lengths are read
    together, which takes 0.7 of the time of batches in the order of the text."""
    for start in range(0, len(sentences), window):
        part = sentences[start:start + window]
        found = [{}] * len(part)
        for indices in by_length([len(words) for words in part], size):
            documents = [Document("", [part[i]]) for i in indices]
            predictions = predict_batch(model, documents, vocabulary)
            for i, *rows in zip(indices, *predictions.values()):
                found[i] = dict(zip(predictions, rows))
        yield from found

def predict_batch(model, documents, vocabulary):
    """{task: rows of every sentence, or document}; relations with the spans of their arguments."""
    batch = make_batch(documents, vocabulary).to(model.device())
    predictions = model.predict(batch)
    if "rel" in predictions:
        last_tokens = [[(t, t, "") for t in range(n)] for n in batch.lengths]
        spans = predictions.get(argument_tagger(predictions), last_tokens)
        predictions["rel"] = list(map(with_spans, predictions["rel"], spans))
    return predictions
