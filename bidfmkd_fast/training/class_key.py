"""Say under which class of the task memory the images of an API's class are kept."""

from __future__ import annotations

from bidfmkd_fast.black_box import BlackBox


def class_key(api: BlackBox, index: int, label: int, sized: bool) -> tuple[str, str]:
    """Return the key of a class in the memory: its data set and its name.

    APIs without class names get keys of their own, so that their classes are never merged. The
    images of a data set have one shape in the memory. Therefore, if the shapes of the APIs
    differ (`sized`), the shape takes the place of the data set's name where that is unknown.
    """
    names, data_set = api.spec.class_names, api.spec.data_set
    if sized and not data_set:
        data_set = "{} x {} x {}".format(*api.spec.image_shape)
    return data_set, names[label] if names else f"API {index} class {label}"
