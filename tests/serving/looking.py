"""Functions that run in a worker of vLLM, on its model. A worker imports them from here."""


def look(model):
    """The kinds of FFNs in a worker, and the sizes of the batches that they see from now on."""
    from lte.inference import packed
    from lte.modules.sparse_ffn import Selecting

    sizes = []
    computed = packed.sparse_ffn

    def counted(x_TD, *args):
        sizes.append(x_TD.numel() // x_TD.shape[-1])
        return computed(x_TD, *args)

    packed.sparse_ffn = counted
    model.sizes = sizes
    layers = [module for module in model.modules() if isinstance(module, Selecting)]
    devices = {str(one.device) for layer in layers for one in layer.state_dict().values()}
    return [type(layer).__name__ for layer in layers], sorted(devices)


def sizes(model):
    return model.sizes
