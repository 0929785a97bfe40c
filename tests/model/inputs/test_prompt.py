import numpy as np

from model.inputs.prompt import PromptTemplate


def test_the_image_token_stands_once_for_every_feature():
    filled = PromptTemplate((1, 2), (3,), image_token_id=9).fill(4)
    assert filled.dtype == np.int32
    assert filled.tolist() == [1, 2, 9, 9, 9, 9, 3]
