"""One small corpus for all data tests: the Python language reference and a vocabulary trained on it."""

import pytest

from bert_fast.data import encode_documents, read_documents, train_tokenizer


@pytest.fixture(scope="session")
def documents():
    return read_documents()


@pytest.fixture(scope="session")
def tokenizer(documents):
    return train_tokenizer((sentence for document in documents for sentence in document), 3000)


@pytest.fixture(scope="session")
def corpus(documents, tokenizer):
    return encode_documents(documents, tokenizer)
