import pytest

from quantwm.errors import UsageError
from quantwm.quant import (
    ActivationScheme,
    LayerScheme,
    PerChannel,
    PerGroup,
    PerTensor,
    WeightScheme,
)

SHORT_NAMES = {
    "float": LayerScheme(),
    "w8": LayerScheme(WeightScheme(8)),
    "w4": LayerScheme(WeightScheme(4, True, PerChannel(), "absmax")),
    "w4g128": LayerScheme(WeightScheme(4, granularity=PerGroup(128))),
    "w8a8": LayerScheme(WeightScheme(8), ActivationScheme(8, False, "per_tensor_static")),
    "w8a8-dynamic": LayerScheme(
        WeightScheme(8), ActivationScheme(8, granularity="per_tensor_dynamic")
    ),
    "w4a4-token": LayerScheme(WeightScheme(4), ActivationScheme(4, granularity="per_token")),
    "w4g128a8-token": LayerScheme(
        WeightScheme(4, granularity=PerGroup(128)), ActivationScheme(8, granularity="per_token")
    ),
    "a8-token": LayerScheme(None, ActivationScheme(8, granularity="per_token")),
    "a6-a_symmetric": LayerScheme(None, ActivationScheme(6, symmetric=True)),
    "w3-w_tensor": LayerScheme(WeightScheme(3, granularity=PerTensor())),
    "w4g32-w_asymmetric": LayerScheme(WeightScheme(4, False, PerGroup(32))),
    "w2-w_study": LayerScheme(WeightScheme(2, scale_rule="study")),
    "w4a8-dynamic-a_symmetric-w_tensor-w_study": LayerScheme(
        WeightScheme(4, True, PerTensor(), "study"),
        ActivationScheme(8, True, "per_tensor_dynamic"),
    ),
}


@pytest.mark.parametrize("name", SHORT_NAMES)
def test_short_name_is_read_and_printed(name):
    scheme = LayerScheme.parse(name)
    assert scheme == SHORT_NAMES[name]
    assert str(scheme) == name


@pytest.mark.parametrize("name", SHORT_NAMES)
def test_full_form_round_trips(name):
    scheme = SHORT_NAMES[name]
    assert LayerScheme.from_dict(scheme.to_dict()) == scheme
    assert LayerScheme.parse(scheme.to_dict()) == scheme


def test_full_form_fills_in_defaults():
    form = {"weight": {"bits": 4, "granularity": {"per_group": 64}}}
    assert LayerScheme.parse(form) == LayerScheme.parse("w4g64")


def test_case_and_order_of_suffixes_do_not_matter():
    assert LayerScheme.parse(" W4A8-w_study-TOKEN ") == LayerScheme.parse("w4a8-token-w_study")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("w9", "weight bits must be an integer from 2 to 8, got 9"),
        ("w1", "weight bits must be an integer from 2 to 8, got 1"),
        ("w4a16", "activation bits must be an integer from 2 to 8, got 16"),
        ("w4g0", "size of at least 1, got 0"),
        ("w4g", "g needs a group size"),
        ("w4a8-tokn", "did you mean 'token'"),
        ("w4-token", "token needs activations"),
        ("a8-w_study", "w_study needs weights"),
        ("w4a8-token-dynamic", "exclude each other"),
        ("w4g8-w_tensor", "exclude each other"),
        ("w4-w_study-w_study", "written twice"),
        ("w4-w_asymmetric-w_study", "symmetric weights only"),
        ("int4", "cannot read the scheme 'int4'"),
        ("", "cannot read the scheme ''"),
        ("-token", "cannot read the scheme '-token'"),
    ],
)
def test_bad_name_says_what_is_wrong(text, message):
    with pytest.raises(UsageError, match=message):
        LayerScheme.parse(text)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"weights": {"bits": 4}}, "did you mean 'weight'"),
        ({"weight": {"bit": 4}}, "did you mean 'bits'"),
        ({"weight": {}}, "lacks 'bits'"),
        ({"weight": 4}, "a mapping such as"),
        ({"weight": {"bits": "4"}}, "an integer from 2 to 8, got '4'"),
        ({"weight": {"bits": True}}, "an integer from 2 to 8, got True"),
        ({"weight": {"bits": 4, "symmetric": "yes"}}, "true or false"),
        ({"weight": {"bits": 4, "granularity": "per_row"}}, "'per_channel'"),
        ({"weight": {"bits": 4, "granularity": {"per_group": 1.5}}}, "at least 1, got 1.5"),
        ({"weight": {"bits": 4, "scale_rule": "absmx"}}, "did you mean 'absmax'"),
        ({"activation": {"bits": 8, "granularity": "per_tokens"}}, "did you mean 'per_token'"),
    ],
)
def test_bad_full_form_says_what_is_wrong(form, message):
    with pytest.raises(UsageError, match=message):
        LayerScheme.parse(form)


def test_a_scheme_is_neither_number_nor_none():
    with pytest.raises(UsageError, match="got 8"):
        LayerScheme.parse(8)
