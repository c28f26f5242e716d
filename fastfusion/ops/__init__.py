"""The functional API of the operators."""

from fastfusion.ops.haar import haar_dwt2d, haar_idwt2d, haar_split2d
