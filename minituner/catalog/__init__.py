"""The catalog: models, methods, data sets, templates and system texts as data, and the recipes composed from them.

Every shipped recipe is a name put together from three lists, so thousands of recipes need no copied files:

    models.yaml        methods.yaml   datasets.yaml
    internlm2_1_8b  _  qlora       _  alpaca        _ e3     ->  compose("internlm2_1_8b_qlora_alpaca_e3")

`lookup` reads the lists and composes; `names` is the grammar of the names. Lesson: notebook 00.
"""

from minituner.catalog.lookup import (
    compose,
    find_model,
    find_template,
    list_recipes,
    load,
    system_prompt,
    xtuner_name,
)

__all__ = ["compose", "find_model", "find_template", "list_recipes", "load", "system_prompt", "xtuner_name"]
