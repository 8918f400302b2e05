"""Stand-ins for other libraries: change the import, keep the code.

``flash_entmax.compat.entmax``
    deep-spin's ``entmax`` 1.3
``flash_entmax.compat.adasplash``
    ``adasplash`` 0.2.2
``flash_entmax.compat.sdpa``
    ``torch.nn.functional.scaled_dot_product_attention``
"""
