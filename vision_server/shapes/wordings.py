"""The ways people ask about shapes in a picture."""

ENGLISH_PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "star": "stars"}
ENGLISH_PICTURES = ("image", "picture", "photo")

THAI_SHAPES = {"circle": "วงกลม", "square": "สี่เหลี่ยม", "triangle": "สามเหลี่ยม", "star": "ดาว"}
THAI_SHAPE_SYNONYMS = {
    "circle": ("วงกลม", "วงกลม", "รูปวงกลม"),
    "square": ("สี่เหลี่ยม", "สี่เหลี่ยม", "รูปสี่เหลี่ยม", "สี่เหลี่ยมจัตุรัส"),
    "triangle": ("สามเหลี่ยม", "สามเหลี่ยม", "รูปสามเหลี่ยม"),
    "star": ("ดาว", "ดาว", "รูปดาว"),
}
# The counting word depends on what is counted; "" is a question about all shapes.
THAI_UNITS = {
    "": ("ชิ้น", "รูป", "อัน"),
    "circle": ("ชิ้น", "รูป", "วง", "อัน"),
    "square": ("ชิ้น", "รูป", "อัน"),
    "triangle": ("ชิ้น", "รูป", "อัน"),
    "star": ("ชิ้น", "รูป", "ดวง", "อัน"),
}
THAI_PICTURES = ("ภาพ", "ภาพนี้", "รูป", "รูปนี้", "รูปภาพ")
THAI_COLOURS = {
    "red": "สีแดง",
    "green": "สีเขียว",
    "blue": "สีน้ำเงิน",
    "yellow": "สีเหลือง",
    "purple": "สีม่วง",
    "orange": "สีส้ม",
}

WORDINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "describe": {
        "en": (
            "Describe the {picture}.",
            "Describe this {picture}.",
            "What is in the {picture}?",
            "What is in this {picture}?",
            "What's in this {picture}?",
            "What do you see?",
            "What do you see in the {picture}?",
            "What can you see in this {picture}?",
            "What does this {picture} show?",
            "Tell me what is in the {picture}.",
            "What shapes are in the {picture}?",
            "List the shapes in this {picture}.",
        ),
        "th": (
            "อธิบายภาพนี้",
            "อธิบาย{picture}",
            "บรรยายภาพนี้",
            "บรรยาย{picture}",
            "ใน{picture}มีอะไรบ้าง",
            "{picture}มีอะไรบ้าง",
            "มีอะไรใน{picture}",
            "มีอะไรอยู่ใน{picture}บ้าง",
            "เห็นอะไรใน{picture}บ้าง",
            "คุณเห็นอะไรบ้าง",
            "ช่วยอธิบาย{picture}",
            "ใน{picture}มีรูปทรงอะไรบ้าง",
        ),
    },
    "total": {
        "en": (
            "How many shapes are there?",
            "How many shapes are in the {picture}?",
            "How many shapes are there in this {picture}?",
            "How many shapes do you see?",
            "How many objects are there?",
            "How many objects are in the {picture}?",
            "Count the shapes.",
            "Count all the shapes in the {picture}.",
            "What is the total number of shapes?",
        ),
        "th": (
            "มีรูปทรงกี่{unit}",
            "มีรูปทรงทั้งหมดกี่{unit}",
            "นับรูปทรงทั้งหมด",
            "นับรูปทรงใน{picture}",
            "ใน{picture}มีรูปทรงกี่{unit}",
            "{picture}มีรูปทรงทั้งหมดกี่{unit}",
            "มีวัตถุกี่ชิ้น",
            "ใน{picture}มีวัตถุกี่ชิ้น",
            "จำนวนรูปทรงทั้งหมดเท่าไร",
        ),
    },
    "count": {
        "en": (
            "How many {shapes} are there?",
            "How many {shapes} are in the {picture}?",
            "How many {shapes} are there in this {picture}?",
            "How many {shapes} do you see?",
            "How many {shapes} can you see in the {picture}?",
            "Count the {shapes}.",
            "Count the {shapes} in the {picture}.",
            "What is the number of {shapes}?",
        ),
        "th": (
            "มี{shape}กี่{unit}",
            "ใน{picture}มี{shape}กี่{unit}",
            "{picture}มี{shape}กี่{unit}",
            "นับ{shape}",
            "นับ{shape}ใน{picture}",
            "มี{shape}ทั้งหมดกี่{unit}",
            "เห็น{shape}กี่{unit}",
            "จำนวน{shape}เท่าไร",
        ),
    },
    "colour": {
        "en": (
            "What {hue} is the {shape}?",
            "What {hue} is the {shape} in the {picture}?",
            "Which {hue} is the {shape}?",
            "Which {hue} does the {shape} have?",
            "What is the {hue} of the {shape}?",
            "Tell me the {hue} of the {shape}.",
            "The {shape} is what {hue}?",
        ),
        "th": (
            "{shape}สีอะไร",
            "{shape}มีสีอะไร",
            "{shape}เป็นสีอะไร",
            "{shape}ใน{picture}สีอะไร",
            "{shape}ใน{picture}มีสีอะไร",
            "บอกสีของ{shape}",
            "สีของ{shape}คืออะไร",
        ),
    },
    "exists": {
        "en": (
            "Is there a {shape}?",
            "Is there a {shape} in the {picture}?",
            "Is there any {shape} in this {picture}?",
            "Do you see a {shape}?",
            "Can you see a {shape} in the {picture}?",
            "Does the {picture} have a {shape}?",
            "Does this {picture} contain a {shape}?",
            "Are there any {shapes}?",
        ),
        "th": (
            "มี{shape}ไหม",
            "มี{shape}หรือไม่",
            "มี{shape}ใน{picture}ไหม",
            "ใน{picture}มี{shape}ไหม",
            "ใน{picture}มี{shape}หรือไม่",
            "เห็น{shape}ไหม",
            "เห็น{shape}หรือไม่",
            "มี{shape}หรือเปล่า",
        ),
    },
    "exists coloured": {
        "en": (
            "Is there a {colour} {shape}?",
            "Is there a {colour} {shape} in the {picture}?",
            "Do you see a {colour} {shape}?",
            "Does the {picture} have a {colour} {shape}?",
        ),
        "th": (
            "มี{shape}{colour}ไหม",
            "มี{shape}{colour}หรือไม่",
            "ใน{picture}มี{shape}{colour}ไหม",
            "เห็น{shape}{colour}ไหม",
        ),
    },
    "which": {
        "en": (
            "What shape is {colour}?",
            "Which shape is {colour}?",
            "Which shape is {colour} in the {picture}?",
            "What is the {colour} shape?",
            "What is the {colour} object?",
            "Which object is {colour}?",
            "What shape is the {colour} one?",
            "Which one is {colour}?",
        ),
        "th": (
            "รูปทรงใด{colour}",
            "รูปทรงไหน{colour}",
            "อะไร{colour}",
            "อะไรมี{colour}",
            "รูปทรง{colour}คืออะไร",
            "รูปทรงไหนเป็น{colour}",
            "อะไรเป็น{colour}ใน{picture}",
            "ชิ้น{colour}คือรูปอะไร",
        ),
    },
}
