"""Distances between checkpoints in the norms of the rules, computed here so that train_gpt does not judge itself."""
import math
import operator


def distance(after, before, norms):
    """max over tensors of ||after - before|| in norms(name, shape), one of the functions below; all s_l = 1."""
    return max(norms(name, shape)([x - y for x, y in zip(values, before[name][1])], shape)
               for name, (shape, values) in after.items())


def largest_entry(values, _shape):
    """l1->linf"""
    return max(map(abs, values))


def rms(values, _shape):
    return math.sqrt(sum(map(operator.mul, values, values)) / len(values))


def largest_row_rms(values, shape):
    """l1->RMS of an embedding that is stored (vocabulary, channels): its largest row."""
    width = shape[-1]
    return max(rms(values[i:i + width], None) for i in range(0, len(values), width))


def spectral(values, shape):
    """The largest singular value, by the power method on the smaller Gram matrix."""
    rows, columns = shape
    lines = [values[i * columns:(i + 1) * columns] for i in range(rows)]
    if rows > columns:
        lines = list(zip(*lines))
    gram = [[sum(map(operator.mul, a, b)) for b in lines] for a in lines]
    vector, value = [1 + 0.1 * math.sin(i) for i in range(len(gram))], 0.0
    for _ in range(60):
        vector = [sum(map(operator.mul, row, vector)) for row in gram]
        value = math.sqrt(sum(map(operator.mul, vector, vector)))
        if value == 0:
            return 0.0
        vector = [x / value for x in vector]
    return math.sqrt(value)


def blocks(values, shape):
    """The (in, out) matrices of a Linear that is stored as Hugging Face's GPT-2 does; a fused q, k, v is three."""
    inputs, outputs = shape
    parts = 3 if outputs == 3 * inputs else 1
    each = outputs // parts
    for p in range(parts):
        yield [x for i in range(inputs) for x in values[i * outputs + p * each:i * outputs + (p + 1) * each]], (inputs, each)


def spectral_blocks(values, shape):
    return max(spectral(part, size) for part, size in blocks(values, shape))


def rms_to_rms(values, shape):
    return max(math.sqrt(size[0] / size[1]) * spectral(part, size) for part, size in blocks(values, shape))
