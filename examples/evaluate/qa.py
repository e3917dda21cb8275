"""The measure of `qa_likelihood.yaml`: lm_eval's perplexity is per answer, whatever its length."""

from __future__ import annotations


def likelihood(
    doc: dict[str, str], results: list[tuple[float, bool]]
) -> dict[str, bool | tuple[float, int]]:
    """Return an answer's accuracy and likelihood, the latter with its length in bytes.

    Args:
        doc: a row of the parquet file.
        results: the answer's log-likelihood in nats; whether its every token is the likeliest.
    """
    ((log_likelihood, is_greedy),) = results
    return {
        "acc": is_greedy,
        "bits_per_byte": (log_likelihood, len(doc["response"].encode("utf-8"))),
    }
