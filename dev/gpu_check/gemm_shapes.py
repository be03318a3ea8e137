#!/usr/bin/env python3
"""The matrix products of a GPT-2 training step, one case name a line, for `harness --cases`.

Of each linear layer (qkv, proj, fc, fcproj; weight (out, in), N tokens): the forward product y = x w^T + bias, the
gradient of its input dx = dy w, and of its weight dw = dy^T x; and the same three of the head, over one chunk of
tokens, whose weight gradient adds up over the chunks.
"""
import argparse


def cases(tokens, channels, padded_vocab, chunk):
    layers = [("qkv", 3 * channels, channels), ("proj", channels, channels), ("fc", 4 * channels, channels),
              ("fcproj", channels, 4 * channels)]
    for name, out, inner in layers:
        yield f"matmul/M={tokens},N={out},K={inner},NT,bias  # {name} forward"
        yield f"matmul/M={tokens},N={inner},K={out},NN  # {name} input gradient"
        yield f"matmul/M={out},N={inner},K={tokens},TN,f32,dbias  # {name} weight gradient"
    yield f"matmul/M={chunk},N={padded_vocab},K={channels},NT  # head forward"
    yield f"matmul/M={chunk},N={channels},K={padded_vocab},NN  # head input gradient"
    yield f"matmul/M={padded_vocab},N={channels},K={chunk},TN,f32,accumulate  # head weight gradient"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--channels", type=int, default=768)
    parser.add_argument("--vocab", type=int, default=50304, help="padded")
    parser.add_argument("--chunk", type=int, default=8192, help="tokens of the head at a time")
    o = parser.parse_args()
    print("\n".join(cases(o.tokens, o.channels, o.vocab, o.chunk)))


if __name__ == "__main__":
    main()
