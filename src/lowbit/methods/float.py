"""The float twin: the same network without quantization."""

from lowbit.methods.base import Method, Recipe, registry


@registry.register
def float() -> Method:
    """32-bit weights and activations; what every low-bit network is compared with.

    Block order: convolution, batch norm, ReLU, pooling.
    """
    return Method(
        name="float",
        title="Float twin",
        paper="the same network in float32",
        url="",
        bits_w=32,
        bits_a=32,
        block="conv_bn_act",
        recipe=Recipe(
            optimizer="sgd",
            learning_rate=0.1,
            weight_decay=5e-4,
            schedule="cosine",
            warmup=1,
            source="common practice for CIFAR-10: SGD 0.1 with momentum and cosine decay",
        ),
    )
