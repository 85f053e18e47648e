"""MiniSQA, the built-in generated data set."""

from data_shards.mini_sqa.generate import content_sha256 as content_sha256
from data_shards.mini_sqa.generate import write_mini_sqa as write_mini_sqa
