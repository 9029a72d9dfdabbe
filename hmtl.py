r"""The model: shared layers below, one head per task above. Read tasks.py before, train.py after.

    word vectors, char CNN -> BiLSTM ner -> BiLSTM emd -> BiLSTM rel     (an encoder each,
                                |             |     \         |          a head each)
                             CRF tags      CRF tags  \    pair scores
                                                      -> BiLSTM coref -> antecedent scores

HMTL (Sanh, Wolf & Ruder, AAAI 2019, "the paper") puts the simple tasks at the bottom and the
complex ones at the top; every encoder reads the word vectors and the encoder below. `HMTL.forward`
takes the name of a task and a batch; it returns a loss in training, predictions in evaluation.

What differs from the paper, and why:
- No ELMo: the packages are torch and numpy. Scores are lower by what ELMo brings.
- For coreference too every sentence of a document is encoded on its own, as in Lee et al. 2017: the
  lower encoders then see what they see in the other tasks.
- A sentence's loss is the sum over its tokens or pairs; a batch's is the mean over its sentences
  (for coreference, the sum over its one document). Every result is independent of the batch; the
  authors' code averaged relations over padding.
- A rare word, of one training document, is read as the unknown word half of the time. So the vector
  of the unknown is trained, and coreference learns to match names by their characters.
- The output bias of the relation head starts at -7: one pair and label in some thousand is true.
  From 0 the first hundreds of steps would go into learning that.
- The LSTMs start from larger weights than torch gives them, see `Encoder`; a task whose dev score
  is still 0 loses neither patience nor learning rate (train.py). Without the two, the relation head
  was seen to predict nothing for 60 epochs.
- In training, gold mentions are kept beside those with the best scores. Else all scores may fall
  together until no gold mention is kept: the loss is then 0, and stays there.
- Dropout on words is drawn once for each distinct word of a batch: fewer numbers to draw.
- The coreference scorers drop parts of what they read, not their hidden units, of which there are
  many more to draw.

Shape letters: B sentences, T tokens of the longest, N tokens of a document, U distinct words,
C their characters, D width of what is read, H units of a layer, K tags, R relation labels, W span
widths, S kept spans, G width of a span's representation, A antecedents.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tasks import COREF_SCORES, Document, Scores, count_rows, shifted


@dataclass
class Settings:
    """Everything that a run can be told. Each field is a flag of train.py; its comment is the help
    that train.py shows."""
    tasks: tuple = ("ner", "emd", "rel", "coref")      # which of these to train
    data: tuple = ()                   # DIR for all tasks, or TASK=DIR ...; none: built-in corpus
    vectors: str = ""                  # file of word vectors, GloVe text
    # model
    word_dim: int = 100                # width of word vectors, where there is no file of them
    char_dim: int = 16                 # width of character vectors
    char_filters: int = 64             # filters of the char CNN, each over three characters
    ner_encoder: str = "2x64"          # BiLSTM of the task: layers x units per direction
    emd_encoder: str = "2x64"          # the same
    rel_encoder: str = "3x64"          # the same
    coref_encoder: str = "1x200"       # the same
    dropout: float = 0.4               # on word vectors and on every layer's output
    rare: int = 1                      # words of at most so many training documents are rare
    unknown: float = 0.5               # probability that a rare word is made unknown in training
    relation_units: int = 128          # hidden units of the relation head
    coref_units: int = 150             # hidden units of the mention and antecedent scorers
    max_span: int = 8                  # tokens in a coreference span
    spans_per_token: float = 0.4       # coreference spans that are kept
    antecedents: int = 70              # nearest kept spans that are scored
    max_tokens: int = 4000             # longer training documents of coreference are cut
    sharing: str = "hierarchical"      # which encoders a head reads: see `layout` in hmtl.py
    # training
    batch_size: int = 32               # sentences in a batch; coreference takes one document
    lr: float = 1e-3                   # learning rate of every task's Adam
    clip: float = 5.0                  # largest gradient norm
    schedule: str = "proportional"     # which task next: see `plan_epoch` in train.py
    successive_delta: float = 1e-2     # weight of the distance from the task before, if successive
    epochs: int = 40                   # an epoch: as many steps as there are batches in all
    patience: int = 20                 # epochs without improvement until a task may end
    lr_patience: int = 8               # its learning rate is halved after more epochs than this
    seed: int = 0                      # everything random follows from it
    device: str = ""                   # such as cpu or cuda:1; none: a GPU where there is one


# task -> the tasks below it, the nearest first; the first that is chosen feeds the task's encoder
HIERARCHY = {"ner": [], "emd": ["ner"], "rel": ["emd", "ner"], "coref": ["emd", "ner"]}


def layout(sharing, tasks):
    """Which encoders feed each task's encoder, and which its head reads: two {task: [tasks]}.

    hierarchical  the tree of the paper; a head reads the encoder of its task
    inverted      the same tree upside down: complex tasks at the bottom
    flat          one stack of all encoders, whose top every head reads
    latent        the tree, but a head reads a learned mixture of all encoders, after the idea of
                  Ruder et al. 2017, "Latent multi-task architecture learning"
    """
    tree = below = {task: [t for t in HIERARCHY[task] if t in tasks][:1] for task in tasks}
    reads = {task: [task] for task in tasks}
    if sharing == "inverted":
        below = {task: [t for t in tasks if task in tree[t]] for task in tasks}
    elif sharing == "flat":
        below = {task: [t] if t else [] for t, task in zip([None, *tasks], tasks)}
        reads = {task: [[*tasks][-1]] for task in tasks}
    elif sharing == "latent":
        reads = {task: [*tasks] for task in tasks}
    return below, reads


# --------------------------------------------------------------------------------- shared layers

def dropout_factors(mask, width, p, training):
    """Dropout and padding: what to multiply (..., width) values with. 0 where mask (...) is False;
    elsewhere 1, or in training 0 with probability p (in 256ths), else 1 / (1 - p). A random number
    makes eight bytes, a byte for a value: an eighth of the time of F.dropout on a CPU."""
    if not training:
        return mask[..., None]
    numbers = torch.randint(-2 ** 63, 2 ** 63 - 1, (*mask.shape, width // 8 + 1),
                            device=mask.device)
    dropped = int(256 * p)
    drawn = numbers.view(torch.uint8)[..., :width] >= dropped
    return drawn * (mask * (256 / (256 - dropped)))[..., None]


class Embedder(nn.Module):
    """Word vector and char CNN of every token, computed once for each distinct word of a batch."""

    def __init__(self, vocabulary, settings, vectors=None):
        super().__init__()
        width = settings.word_dim
        self.n_trained = len(vocabulary.counts)
        table = torch.randn(len(vocabulary.words), width) * 0.1
        table[0] = 0.0                                                           # padding
        if vectors:
            words, values = vectors
            table[[vocabulary.word_ids[word] for word in words]] = torch.from_numpy(values)
        self.words = nn.Embedding.from_pretrained(table[:self.n_trained].clone(), freeze=False,
                                                  padding_idx=0)
        # Words that only the vector file has never get a gradient: they stay out of the optimizer.
        self.register_buffer("other_words", table[self.n_trained:].clone())
        self.chars = nn.Embedding(len(vocabulary.chars), settings.char_dim, padding_idx=0)
        nn.init.zeros_(self.chars.weight[1].data)       # no training word has an unknown character
        self.filters = nn.Linear(3 * settings.char_dim, settings.char_filters)
        rare = torch.tensor(vocabulary.counts) <= settings.rare
        self.register_buffer("unknown", settings.unknown * rare, persistent=False)
        self.dropout, self.width = settings.dropout, width + settings.char_filters

    def forward(self, batch):
        """(B, T, D), zero on padding."""
        ids = batch.words
        if self.training:           # training documents have no word of the vector file alone
            drawn = torch.rand(ids.shape, device=ids.device) < self.unknown[ids]
            ids = torch.where(drawn, 1, ids)
        vectors = self.words(ids.clamp(max=self.n_trained - 1))                  # (U, D)
        if len(self.other_words):
            others = self.other_words[(ids - self.n_trained).clamp(min=0)]
            vectors = torch.where((ids < self.n_trained)[:, None], vectors, others)
        # Words lie in one row with a 0 between them. A window of three around every character, and
        # the maximum over each word's windows; starting it from 0 makes it a ReLU. Without padded
        # characters nothing can depend on the longest word, and it takes half to two thirds of the
        # time of a padded convolution.
        windows = batch.chars.unfold(0, 3, 1)[batch.chars[1:-1] > 0]             # (C, 3)
        shapes = torch.segment_reduce(self.filters(self.chars(windows).flatten(1)), "max",
                                      lengths=batch.n_chars, initial=0.0)        # (U, D)
        factors = dropout_factors(batch.n_chars > 0, self.width, self.dropout, self.training)
        features = torch.cat([vectors, shapes], 1) * factors
        return F.embedding(batch.tokens, features)                               # (B, T, D)


class Encoder(nn.Module):
    """A stack of bidirectional LSTM layers, exact on padded input.

    A plain padded BiLSTM is wrong: its backward half starts in the padding. Here the layers have no
    bias; they read [x, m], m being the mask, and x zero on padding. So the weights of the last
    column are the bias within a sentence; in the padding nothing moves the state from zero.
    """

    def __init__(self, width, shape, dropout):
        super().__init__()
        n_layers, units = map(int, shape.split("x"))
        self.width, self.dropout = 2 * units, dropout
        self.layers = nn.ModuleList(
            nn.LSTM((self.width if i else width) + 1, units, bias=False, batch_first=True,
                    bidirectional=True) for i in range(n_layers))
        # torch starts every weight within +-1 / sqrt(H), biases too. Through three stacked layers
        # the tokens of a sentence then end up 0.01 apart, and the relation head learns nothing for
        # hundreds of steps. Glorot & Bengio 2010 for the input, orthogonal for the state, and an
        # open forget gate (Jozefowicz et al. 2015) keep them 0.1 apart.
        with torch.no_grad():
            for name, weight in self.layers.named_parameters():
                for i, gate in enumerate(weight.chunk(4)):       # input, forget, cell, output
                    if "weight_hh" in name:
                        nn.init.orthogonal_(gate)
                    else:
                        nn.init.xavier_uniform_(gate)
                        gate[:, -1] = float(i == 1)              # the bias

    def forward(self, x, mask, groups=()):
        """(B, T, D), (B, T) -> (B, T, 2 H), both zero on padding. groups: see `Batch`."""
        if len(groups) > 1:
            outputs = [F.pad(self(x[rows, :longest], mask[rows, :longest]),
                             (0, 0, 0, mask.shape[1] - longest)) for rows, longest in groups]
            return torch.cat(outputs)[torch.cat([rows for rows, _ in groups]).argsort()]
        for lstm in self.layers:
            x, _ = lstm(torch.cat([x, mask[:, :, None]], -1))
            x = x * dropout_factors(mask, self.width, self.dropout, self.training)
        return x


# ------------------------------------------------------------------------- ner and emd: a tagger

class CRF(nn.Module):
    """Linear-chain conditional random field over K tags (Lafferty et al. 2001)."""

    SCALED = 4      # tokens from one scaling of the forward states to the next

    def __init__(self, allowed):
        """allowed: (K + 1, K + 1) bool, [i, j] whether tag j may follow i; K is start and end."""
        super().__init__()
        n_tags = len(allowed) - 1
        self.transitions = nn.Parameter(torch.zeros(n_tags, n_tags))
        self.start = nn.Parameter(torch.zeros(n_tags))
        self.end = nn.Parameter(torch.zeros(n_tags))
        barred = torch.zeros(n_tags + 1, n_tags + 1).masked_fill(~allowed, float("-inf"))
        self.register_buffer("barred", barred, persistent=False)     # used in decoding only

    def loss(self, emissions, tags, mask):
        """Negative log-likelihood of tags: (B, T, K), (B, T), (B, T) -> (B,)."""
        return self.log_partition(emissions, mask) - self.score(emissions, tags, mask)

    def score(self, emissions, tags, mask):
        last = mask.sum(1) - 1                                                   # (B,)
        emitted = emissions.gather(2, tags[:, :, None])[:, :, 0]                 # (B, T)
        moved = self.transitions[tags[:, :-1], tags[:, 1:]]                      # (B, T - 1)
        return ((emitted * mask).sum(1) + (moved * mask[:, 1:]).sum(1) + self.start[tags[:, 0]]
                + self.end[tags.gather(1, last[:, None])[:, 0]])

    def log_partition(self, emissions, mask):
        """log of the sum over all tag sequences of exp(score), (B,).

        The forward algorithm on probabilities instead of their logs: one matrix product a token
        instead of a logsumexp over (B, K, K), a ninth of the time with 73 tags. Every few tokens
        the states are scaled to sum 1, and the logs of the scales added up; the result does not
        depend on the scales, so no gradient needs to go through them. exp(transitions) must stay
        above 0: learned ones do, hard -10,000 would not, hence `barred` in decoding only.
        """
        top = emissions.amax(2, keepdim=True).detach()
        emitted = (emissions - top).exp().unbind(1)                              # T times (B, K)
        transitions = self.transitions.exp()
        states, scales = [], []
        for t in range(len(emitted)):
            state = (state @ transitions if t else self.start.exp()) * emitted[t]
            if t % self.SCALED == 0:
                scales.append(state.detach().sum(1, keepdim=True))
                state = state / scales[-1]
            states.append(state)
        logs = (torch.cat(scales, 1).log() * mask[:, ::self.SCALED]).sum(1)      # (B,)
        last = torch.stack(states)[mask.sum(1) - 1, torch.arange(len(mask))]     # (B, K)
        return logs + (top[:, :, 0] * mask).sum(1) + (last @ self.end.exp()).log()

    @torch.no_grad()
    def decode(self, emissions, mask):
        """The best tags among the allowed sequences (Viterbi), (B, T). Behind a sentence: anything.

        Only maxima go forward; the arg max is taken on the way back, along the best path alone.
        """
        transitions = self.transitions + self.barred[:-1, :-1]
        end = self.end + self.barred[:-1, -1]
        best = [self.start + self.barred[-1, :-1] + emissions[:, 0]]
        for emitted in emissions.unbind(1)[1:]:
            best.append((best[-1][:, :, None] + transitions).amax(1) + emitted)  # (B, K)
        last, tags = mask.sum(1) - 1, []
        tag = torch.zeros_like(last)
        for t in reversed(range(len(best))):
            onward = torch.where((last == t)[:, None], end, transitions.T[tag])  # (B, K)
            tag = (best[t] + onward).argmax(1)
            tags.append(tag)
        return torch.stack(tags[::-1], 1)


class Tagger(nn.Module):
    """Spans with labels as BIOUL tags: begin, inside, outside, unit (one word), last.

    Every head has `loss` and `decode` of (x, embedded, batch): what it reads (B, T, 2 H), the
    embedder's output (B, T, D), of which only coreference makes use, and the batch.
    """

    def __init__(self, annotation, width, labels):
        super().__init__()
        self.annotation, self.names = annotation, ["f1"]          # the names of its scores
        self.tags = ["O", *(f"{prefix}-{label}" for label in labels for prefix in "BIUL")]
        self.ids = {tag: i for i, tag in enumerate(self.tags)}
        self.emit = nn.Linear(width, len(self.tags))

        def may_follow(left, right):
            inside = left[0] in "BI"                              # a span is open
            return (right[0] in "IL" and left[2:] == right[2:] if inside
                    else right[0] in "OBU")
        states = [*self.tags, "O"]                                # the last is start and end
        self.crf = CRF(torch.tensor([[may_follow(a, b) for b in states] for a in states]))

    def loss(self, x, embedded, batch):
        tags = np.zeros(batch.tokens.shape, dtype=np.int64)
        for row, document, length in zip(tags, batch.documents, batch.lengths):
            row[:length] = self.tags_of(getattr(document, self.annotation)[0], length)
        return self.crf.loss(self.emit(x), torch.from_numpy(tags).to(x.device), batch.mask).mean()

    def tags_of(self, spans, length):
        """BIOUL numbers; of spans that overlap, the longest."""
        tags = [0] * length
        for start, end, label in outermost(spans):
            if start == end:
                tags[start] = self.ids[f"U-{label}"]
            else:
                tags[start:end + 1] = ([self.ids[f"B-{label}"]]
                                       + [self.ids[f"I-{label}"]] * (end - start - 1)
                                       + [self.ids[f"L-{label}"]])
        return tags

    def decode(self, x, embedded, batch):
        """[(start, end, label)] for every sentence."""
        predictions = []
        tags = self.crf.decode(self.emit(x), batch.mask).tolist()
        for row, length in zip(tags, batch.lengths):
            row, spans = [self.tags[i] for i in row[:length]], []
            for t, tag in enumerate(row):
                if tag[0] in "BU":
                    start = t
                if tag[0] in "LU":
                    spans.append((start, t, tag[2:]))
            predictions.append(spans)
        return predictions


def outermost(spans):
    """Those spans that one tag sequence can hold: the longest of any that share a token."""
    kept = []
    for span in sorted(spans, key=lambda s: (s[0] - s[1], s)):
        if all(span[1] < other[0] or other[1] < span[0] for other in kept):
            kept.append(span)
    return kept


# ------------------------------------------------------------------------------------ rel: pairs

class RelationHead(nn.Module):
    """Multi-head selection (Bekoulis et al. 2018): for every pair of tokens i, j and every label,
    sigmoid(V relu(U h_i + W h_j + b)), where i and j are the last tokens of the arguments. U, W and
    V are that paper's letters, here `first`, `second` and `label`.

    Scores: a relation counts as right where its label and the `last-token` of both arguments are
    (the paper's score); their `boundaries`; or, `strict`, boundaries and types."""

    def __init__(self, width, labels, settings):
        super().__init__()
        self.names, self.labels = ["last-token", "boundaries", "strict"], labels
        self.ids = {label: i for i, label in enumerate(labels)}
        self.first = nn.Linear(width, settings.relation_units)
        self.second = nn.Linear(width, settings.relation_units, bias=False)
        self.label = nn.Linear(settings.relation_units, len(labels))
        for layer in (self.first, self.second, self.label):
            nn.init.xavier_uniform_(layer.weight)
        nn.init.constant_(self.label.bias, -7.0)

    def scores(self, x, batch):
        """Logits of all pairs of each sentence: a list of (T, T, R), T its own length.

        Sentence by sentence, as all padded pairs at once cost 3.5 times the time.
        """
        first = self.first(x)[batch.mask].split(batch.lengths)               # B times (T, H)
        second = self.second(x)[batch.mask].split(batch.lengths)
        return [self.label(F.relu(u[:, None] + w[None])) for u, w in zip(first, second)]

    def loss(self, x, embedded, batch):
        """Binary cross-entropy, summed over the pairs: softplus(s) - s y, y = 1 where related."""
        scores = self.scores(x, batch)
        cells, offset = set(), 0          # a set: arguments of nested spans may share last tokens
        for document, length in zip(batch.documents, batch.lengths):
            cells |= {offset + (i * length + j) * len(self.labels) + self.ids[label]
                      for _, i, _, j, label in document.relations[0]}
            offset += length * length * len(self.labels)
        logits = torch.cat([s.flatten() for s in scores])
        related = torch.tensor(sorted(cells), dtype=torch.long, device=x.device)
        return (F.softplus(logits).sum() - logits[related].sum()) / len(scores)

    def decode(self, x, embedded, batch):
        """[(i, j, label)] for every sentence: the pairs of last tokens with probability > 1/2."""
        return [[(i, j, self.labels[r]) for i, j, r in (s > 0).nonzero().tolist()]
                for s in self.scores(x, batch)]


def with_spans(relations, spans):
    """Relations between last tokens as (start1, end1, start2, end2, label), the arguments being
    the spans that end there; a relation is left out where there is none."""
    start = {end: start for start, end, _ in spans}
    return [(start[i], i, start[j], j, label) for i, j, label in relations
            if i in start and j in start]


# --------------------------------------------------------------------------- coref: antecedents

class PairProduct(torch.autograd.Function):
    """(rows, 1, G), (columns, G), (H, G) -> (rows, columns, H): the products of all pairs through a
    linear layer. Autograd would keep all products for the way back, two thirds of the memory of a
    step; here they are made again."""

    @staticmethod
    def forward(ctx, rows, columns, weight):
        ctx.save_for_backward(rows, columns, weight)
        return (rows * columns) @ weight.T

    @staticmethod
    def backward(ctx, gradient):
        rows, columns, weight = ctx.saved_tensors
        back = gradient @ weight                                     # (rows, columns, G)
        return ((back * columns).sum(1, keepdim=True), (back * rows).sum(0),
                gradient.flatten(0, 1).T @ (rows * columns).flatten(0, 1))


class CorefHead(nn.Module):
    """End-to-end coreference (Lee et al. 2017): every span of up to W words gets a mention score,
    the best are kept, and each kept span picks an antecedent among those before it, or none."""

    ROWS = 4        # spans whose antecedents are scored at once

    def __init__(self, width, word_width, settings):
        super().__init__()
        self.names = list(COREF_SCORES)
        units, feature = settings.coref_units, 20
        self.max_span, self.ratio = settings.max_span, settings.spans_per_token
        self.n_antecedents, self.dropout = settings.antecedents, settings.dropout
        self.attention = nn.Sequential(nn.Linear(width, units), nn.ReLU(), nn.Linear(units, 1))
        self.span_width = nn.Embedding(self.max_span, feature)
        self.distance = nn.Embedding(9, feature)
        # The first layer of the mention scorer reads [first; last; attended words; width]. It is
        # linear: a product per token for each part, summed per span.
        self.mention_first = nn.Linear(width, units)
        self.mention_last = nn.Linear(width, units, bias=False)
        self.mention_words = nn.Linear(word_width, units, bias=False)
        self.mention_width = nn.Linear(feature, units, bias=False)
        self.mention = self.upper_layers(units)
        # The antecedent scorer's, likewise, reads [span; antecedent; their product; distance].
        span = 2 * width + word_width + feature
        self.pair_span = nn.Linear(span, units)
        self.pair_antecedent = nn.Linear(span, units, bias=False)
        self.pair_product = nn.Linear(span, units, bias=False)
        self.pair_distance = nn.Linear(feature, units, bias=False)
        self.pair = self.upper_layers(units)

    @staticmethod
    def upper_layers(units):
        """What a scorer has above its first layer: (..., H) -> (..., 1)."""
        return nn.Sequential(nn.ReLU(), nn.Linear(units, units), nn.ReLU(), nn.Linear(units, 1))

    def gold_clusters(self, batch):
        """For every span, at its number start * W + width - 1, the number of its cluster, from 1; 0
        for none. (N W,)"""
        cluster = torch.zeros(sum(batch.lengths) * self.max_span, dtype=torch.long)
        for i, mentions in enumerate(batch.documents[0].clusters, 1):
            for start, end in mentions:
                if end - start < self.max_span:
                    cluster[start * self.max_span + end - start] = i
        return cluster.to(batch.tokens.device)

    def kept_spans(self, x, embedded, batch, gold=None):
        """The numbers (S,) of the kept spans in the order of the text, their mention scores (S,)
        and their representations g (S, G). Lee et al. 2017, sections 4 and 5."""
        x, embedded = x[batch.mask], embedded[batch.mask]                        # (N, D)
        n, w = len(x), self.max_span
        token, step = torch.arange(n, device=x.device)[:, None], torch.arange(w, device=x.device)
        sentence = torch.arange(len(batch.mask), device=x.device)[:, None].expand_as(batch.mask)
        sentence = sentence[batch.mask]                                          # (N,)
        later = (token + step).clamp(max=n - 1)             # (N, W): a token and those behind it
        valid = (token + step < n) & (sentence[later] == sentence[:, None])

        # Attention of span (start, width) over its words: a softmax over the first `width` of W.
        weights = self.attention(x)[later, 0][:, None, :]                        # (N, 1, W)
        weights = weights.masked_fill(step > step[:, None], float("-inf")).softmax(2)  # (N, W, W)
        hidden = (self.mention_first(x)[:, None] + self.mention_last(x)[later]
                  + weights @ self.mention_words(embedded)[later]
                  + self.mention_width(self.span_width.weight))                  # (N, W, H)
        scores = self.mention(hidden)[:, :, 0].masked_fill(~valid, float("-inf"))
        scores = scores.flatten()                                                # (N W,)

        n_kept = min(max(1, int(self.ratio * n)), int(valid.sum()))
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        chosen[scores.topk(n_kept).indices] = True
        if gold is not None:
            chosen |= (gold > 0) & valid.flatten()
        kept = chosen.nonzero()[:, 0]                                            # (S,)
        first, last = kept // w, kept // w + kept % w
        attended = weights[first, kept % w][:, None] @ embedded[later[first]]    # (S, 1, D)
        g = torch.cat([x[first], x[last], attended[:, 0], self.span_width(kept % w)], 1)  # (S, G)
        dropout = dropout_factors(torch.ones_like(kept), g.shape[1], self.dropout, self.training)
        return kept, scores[kept], g * dropout

    def antecedent_scores(self, scores, g):
        """For blocks of rows: (first row, first column, (rows, columns + 1) scores). Column 0 is no
        antecedent, with score 0; the others are the spans from the first column on; -inf for those
        that are not among the A before the row's span.

        Blocks need no gathering of the (S, A) pairs: antecedents lie side by side.
        """
        as_span, as_antecedent = self.pair_span(g), self.pair_antecedent(g)
        distances = self.pair_distance(self.distance.weight)                     # (9, H)
        edges = torch.tensor([2, 3, 4, 5, 8, 16, 32, 64], device=g.device)       # of 9 buckets
        for row in range(0, len(g), self.ROWS):
            rows = slice(row, min(row + self.ROWS, len(g)))
            first = max(0, row - self.n_antecedents)
            columns = slice(first, rows.stop - 1)
            gap = (torch.arange(rows.start, rows.stop, device=g.device)[:, None]
                   - torch.arange(columns.start, columns.stop, device=g.device))
            hidden = (as_span[rows, None] + as_antecedent[columns]
                      + F.embedding(torch.bucketize(gap, edges, right=True), distances)
                      + PairProduct.apply(g[rows, None], g[columns], self.pair_product.weight))
            pairs = self.pair(hidden)[:, :, 0] + scores[rows, None] + scores[columns]
            pairs = pairs.masked_fill((gap < 1) | (gap > self.n_antecedents), float("-inf"))
            yield row, first, torch.cat([pairs.new_zeros(len(pairs), 1), pairs], 1)

    def loss(self, x, embedded, batch):
        """Negative log of the probability of all correct antecedents, summed over kept spans."""
        gold = self.gold_clusters(batch)
        kept, scores, g = self.kept_spans(x, embedded, batch, gold)
        cluster = gold[kept]                                                     # (S,)
        loss = 0.0
        for row, first, pairs in self.antecedent_scores(scores, g):
            mine = cluster[row:row + len(pairs), None]
            others = cluster[first:first + pairs.shape[1] - 1]
            correct = (mine == others) & (mine > 0) & (pairs[:, 1:] > float("-inf"))
            none = ~correct.any(1, keepdim=True)                 # then no antecedent is correct
            correct = torch.cat([none, correct], 1)
            loss = loss + (pairs.logsumexp(1)
                           - pairs.masked_fill(~correct, float("-inf")).logsumexp(1)).sum()
        return loss

    def decode(self, x, embedded, batch):
        """Clusters of (start, end), of the one document of the batch."""
        kept, scores, g = self.kept_spans(x, embedded, batch)
        best = []
        for _, first, pairs in self.antecedent_scores(scores, g):
            choice = pairs.argmax(1)
            best += torch.where(choice > 0, choice - 1 + first, -1).tolist()
        spans = [(i // self.max_span, i // self.max_span + i % self.max_span)
                 for i in kept.tolist()]
        cluster_of = {}
        for span, antecedent in enumerate(best):
            if antecedent >= 0:
                cluster = cluster_of.setdefault(antecedent, [spans[antecedent]])
                cluster.append(spans[span])
                cluster_of[span] = cluster
        return list({id(c): c for c in cluster_of.values()}.values())


# ------------------------------------------------------------------------------------- the model

class HMTL(nn.Module):
    """The hierarchy of encoders and heads for the chosen tasks."""

    def __init__(self, tasks, labels, vocabulary, settings, vectors=None):
        """tasks: chosen `Task`s, the lowest first; labels: {task name: list of labels}; vectors:
        (words, array) of `read_vectors` or None."""
        super().__init__()
        self.tasks = {task.name: task for task in tasks}
        self.below, self.reads = layout(settings.sharing, self.tasks)
        self.embedder = Embedder(vocabulary, settings, vectors)
        self.encoders, self.heads = nn.ModuleDict(), nn.ModuleDict()

        def add_encoder(name):
            if name not in self.encoders:
                width = self.embedder.width + sum(add_encoder(t).width for t in self.below[name])
                shape = getattr(settings, f"{name}_encoder")
                self.encoders[name] = Encoder(width, shape, settings.dropout)
            return self.encoders[name]
        for name, task in self.tasks.items():
            width = max(add_encoder(t).width for t in self.reads[name])
            if name == "coref":
                self.heads[name] = CorefHead(width, self.embedder.width, settings)
            elif name == "rel":
                self.heads[name] = RelationHead(width, labels[name], settings)
            else:
                self.heads[name] = Tagger(task.annotation, width, labels[name])
        self.mixtures = nn.ParameterDict({name: torch.zeros(len(reads)) for name, reads
                                          in self.reads.items() if len(reads) > 1})
        # The tagger that gives relations their spans: the nearest below.
        self.tagger = next((name for name in ("emd", "ner") if name in self.tasks), None)
        self.metrics = {name: Scores(self.heads[name].names, "mean" if name == "coref" else None)
                        for name in self.tasks}

    def encode(self, batch, tasks):
        """The embedder's output (B, T, D), and {task: what its head reads, (B, T, 2 H)}. Every
        encoder that the tasks need runs once."""
        embedded = self.embedder(batch)
        outputs = {}

        def run(name):
            if name not in outputs:
                x = torch.cat([embedded, *map(run, self.below[name])], 2)
                outputs[name] = self.encoders[name](x, batch.mask, batch.groups)
            return outputs[name]

        def what_is_read(name):
            read = [run(t) for t in self.reads[name]]
            if len(read) == 1:
                return read[0]
            width = max(x.shape[2] for x in read)              # the narrow ones end in zeros
            return sum(weight * F.pad(x, (0, width - x.shape[2]))
                       for weight, x in zip(self.mixtures[name].softmax(0), read))
        return embedded, {name: what_is_read(name) for name in tasks}

    def forward(self, task_name, batch):
        """{"loss": scalar} in training. In evaluation {"predictions": list}, one entry a sentence
        (for coreference: the clusters of the document), and the task's metric is updated."""
        head = self.heads[task_name]
        if self.training:
            embedded, outputs = self.encode(batch, [task_name])
            return {"loss": head.loss(outputs[task_name], embedded, batch)}
        predictions = self.predict(batch, [task_name])
        self.update(task_name, batch, predictions)
        return {"predictions": predictions[task_name]}

    @torch.no_grad()
    def predict(self, batch, tasks=None):
        """{task: predictions} in one pass; for relations, those of the tagger come along."""
        tasks = list(tasks or self.tasks)
        if "rel" in tasks and self.tagger and self.tagger not in tasks:
            tasks.append(self.tagger)
        embedded, outputs = self.encode(batch, tasks)
        return {name: self.heads[name].decode(outputs[name], embedded, batch) for name in tasks}

    def update(self, task_name, batch, predictions):
        metric = self.metrics[task_name]
        if task_name == "coref":
            for name, count in COREF_SCORES.items():
                metric.add(name, count(predictions["coref"], batch.documents[0].clusters))
            return
        for i, document in enumerate(batch.documents):
            found = predictions[task_name][i]
            gold = getattr(document, self.tasks[task_name].annotation)[0]
            if task_name != "rel":
                metric.add("f1", count_rows(found, gold))
                continue
            metric.add("last-token", count_rows(found, [(r[1], r[3], r[4]) for r in gold]))
            if self.tagger:
                spans = predictions[self.tagger][i]
                found = with_spans(found, spans)
                metric.add("boundaries", count_rows(found, gold))
                gold_spans = getattr(document, self.tasks[self.tagger].annotation)
                if gold_spans is not None:
                    metric.add("strict", count_rows(with_types(found, spans),
                                                    with_types(gold, gold_spans[0])))

    def get_metrics(self, task_name, reset=False):
        """{score name: percent} of everything that `forward` evaluated since the last reset."""
        metric = self.metrics[task_name]
        scores = metric.compute()
        if reset:
            metric.reset()
        return scores

    def annotate(self, document, batch):
        """The document with everything that the model predicts, offsets from its start."""
        predictions = self.predict(batch)
        if "rel" in predictions:
            spans = predictions.get(self.tagger)
            if spans is None:      # without a tagger an argument is its last token
                spans = [[(t, t, "") for t in range(n)] for n in batch.lengths]
            predictions["rel"] = list(map(with_spans, predictions["rel"], spans))
        annotated = Document(document.key, document.sentences)
        for name, found in predictions.items():
            if name != "coref":
                rows, found, start = [], iter(found), 0
                for words in document.sentences:
                    rows.append([shifted(row, start) for row in (next(found) if words else [])])
                    start += len(words)
                found = rows
            setattr(annotated, self.tasks[name].annotation, found)
        return annotated


def with_types(relations, spans):
    """Relations with the labels of their arguments' spans."""
    label = {(start, end): label for start, end, label in spans}
    return [(*r, label.get(r[:2]), label.get(r[2:4])) for r in relations]
